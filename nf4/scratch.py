"""Scratch memory of the kernels: one buffer a purpose, device, stream and thread, grown on demand.

What runs on one stream from one thread runs in order, so that a buffer can be used again at once.
While a CUDA graph is captured every call gets memory of its own from the graph's pool, for a graph
may be replayed on any stream.
"""

import threading

import torch
from torch import Tensor

_buffers: dict[tuple[str, torch.device, int, int], Tensor] = {}


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
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make(size, dtype=dtype, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (purpose, device, stream, threading.get_ident())
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < size:
        # Rounded up, so that a few layers of growing sizes do not take a new one each.
        buffer = _buffers[key] = make(-(-size // 4096) * 4096, dtype=dtype, device=device)
    return buffer
