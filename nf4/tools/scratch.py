"""Scratch memory of the kernels: one buffer a purpose, device and thread, grown on demand.

What one thread runs on a device's default stream runs in order, so that a buffer can be used again
at once. On other streams, and while a CUDA graph is captured, every call gets memory of its own and
gives it back when it is done: the allocator hands it to the next call there, and so a graph of many
layers holds one dense weight, that of the largest.
"""

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from nf4.tools import caches, streams

with_release: list[Callable[[], None]] = []  # lets go of what holds buffers elsewhere
_MOST_VIEWS = 64  # kept of one buffer
_Key = tuple[str, torch.device, int]
_buffers: dict[_Key, Tensor] = {}
_views: dict[_Key, dict[tuple[int, int], Tensor]] = {}  # of the buffers there are


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


def matrix(
    purpose: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the first elements of a buffer of `scratch` as a matrix; the same view every time."""
    size = math.prod(shape)
    buffer = scratch(purpose, size, dtype, device)
    key = (purpose, device, threading.get_ident())
    if _buffers.get(key) is not buffer:  # memory of its own
        return buffer.view(shape)
    views = _views.setdefault(key, {})
    if shape not in views:
        if len(views) >= _MOST_VIEWS:  # of sequences of ever new lengths
            views.clear()
        views[shape] = buffer[:size].view(shape)
    return views[shape]


def release_scratch() -> None:
    """Free all scratch memory that nf4's kernels hold; the next call takes what it needs again."""
    _let_go()
    _buffers.clear()
    _views.clear()


def _let_go() -> None:
    for let_go in with_release:
        let_go()


def _get(purpose: str, size: int, dtype: torch.dtype, device: torch.device, zeroed: bool) -> Tensor:
    make = torch.zeros if zeroed else torch.empty
    # Other streams come and go, and torch.compile warms CUDA graphs up on one of its own, from
    # memory that it wants back. The allocator keeps their memory for the next call anyway.
    if device.type == "cuda" and not streams.is_default_stream(_index(device)):
        return make(size, dtype=dtype, device=device)
    key = (purpose, device, threading.get_ident())
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < size:
        if buffer is not None:  # what remembers it would keep it beside the new one
            _let_go()
        # Rounded up, so that a few layers of growing sizes do not take a new one each.
        _views.pop(key, None)
        buffer = _buffers[key] = make(-(-size // 4096) * 4096, dtype=dtype, device=device)
    return buffer


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


caches.at_forget(release_scratch)
