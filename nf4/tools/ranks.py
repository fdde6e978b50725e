"""Tensors that several processes share, as torch.distributed's DTensor holds them."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


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


def copy_whole(target: Tensor, values: Tensor) -> None:
    """Give a tensor, which may be sharded, the values that each process has whole."""
    target.copy_(distributed(values, target) if is_sharded(target) else values)


def reshard(model: nn.Module) -> None:
    """Let what fully_shard manages be sharded, as it is between two steps.

    After a forward pass a group may stay gathered: its parameters are plain then, and copies.
    """
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class Company:
    """The processes that have parts of a model, and which of them writes.

    Args:
        meshes: the device meshes of its parts, of which one may be part of another.
    """

    def __init__(self, meshes: Iterable[Any]) -> None:
        self._meshes = list(meshes)

    def __bool__(self) -> bool:
        """Return whether a mesh has the model, be it of one process."""
        return bool(self._meshes)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes: the first of each mesh."""
        return not any(any(mesh.get_coordinate() or ()) for mesh in self._meshes)

    def agree(self, fine: bool) -> bool:
        """Return whether all are fine; each has to ask."""
        for mesh in self._meshes:
            flag = torch.tensor(int(fine), device=mesh.device_type)
            for dim in range(mesh.ndim):
                group = mesh.get_group(dim)
                torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group)
            fine = bool(flag)
        return fine
