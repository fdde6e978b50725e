"""Tensors that several processes share, as torch.distributed's DTensor holds them."""

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor | None) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Tensor:
    """Return a tensor itself, or all of a DTensor: then each process of its mesh has to ask."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    if tensor.device.type == "meta":
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    full: Tensor = tensor.full_tensor()
    return full


def gathered(state: dict[str, Any], keep: bool = True) -> dict[str, Any]:
    """Return a state dict, DTensors whole and on the CPU, one after another.

    Args:
        state: of a model; each process has to ask, if one of its tensors is a DTensor.
        keep: whether this process wants it; another gets nothing.
    """
    found = {}
    for name, tensor in state.items():
        full = whole(tensor).cpu() if is_sharded(tensor) else tensor
        if keep:
            found[name] = full
    return found


def replicated(tensor: Tensor, like: Any) -> Tensor:
    """Return what each process has whole, as a DTensor on the mesh of another."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def distributed(tensor: Tensor, like: Any) -> Tensor:
    """Return what each process has whole, sharded as another is."""
    from torch.distributed.tensor import distribute_tensor

    placed = (like.device_mesh, like.placements)
    return distribute_tensor(tensor.contiguous(), *placed, src_data_rank=None)


def rank() -> int:
    """Return the rank of this process, 0 where there is only one."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if there else 0
