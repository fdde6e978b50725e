"""Scratch memory of the kernels: one buffer a purpose, device and thread, grown on demand.

What one thread runs on a device's default stream runs in order, so that a buffer can be used again
at once. On other streams, and while a CUDA graph is captured, every call gets memory of its own.
"""

import threading

import torch
from torch import Tensor

_buffers: dict[tuple[str, torch.device, int], Tensor] = {}


def scratch(purpose: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a flat buffer of at least `size` elements, whose contents are left over.

    Args:
        purpose: calls for one purpose share a buffer.
        size: elements wanted.
        dtype: of the elements, always the same for a purpose.
        device: where.
    """
    return _get(purpose, size, dtype, device, zeroed=False)


def zeros(purpose: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a flat buffer of zeros, which the caller must leave all zeros; as `scratch`."""
    return _get(purpose, size, dtype, device, zeroed=True)


def release_scratch() -> None:
    """Free all scratch memory that nf4's kernels hold; the next call takes what it needs again."""
    _buffers.clear()


def _get(purpose: str, size: int, dtype: torch.dtype, device: torch.device, zeroed: bool) -> Tensor:
    make = torch.zeros if zeroed else torch.empty
    if device.type == "cuda":
        current = torch.cuda.current_stream(device)
        # Other streams come and go, and torch.compile warms CUDA graphs up on one of its own, from
        # memory that it wants back. The allocator keeps their memory for the next call anyway.
        if current != torch.cuda.default_stream(device) or torch.cuda.is_current_stream_capturing():
            return make(size, dtype=dtype, device=device)
    key = (purpose, device, threading.get_ident())
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < size:
        # Rounded up, so that a few layers of growing sizes do not take a new one each.
        buffer = _buffers[key] = make(-(-size // 4096) * 4096, dtype=dtype, device=device)
    return buffer
