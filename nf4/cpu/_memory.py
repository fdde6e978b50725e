"""Memory for large results, whose new pages cost more than what is computed into them; arrays."""

import ctypes
import math
import mmap
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

HUGE = 1 << 21  # bytes of a huge page
LEAST = 2 * HUGE


def new_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return new memory as ``torch.empty`` does, in huge pages where the system has them to give.

    The system hands out a large tensor's pages one by one, zeroed, when they are first written: for
    32 MB that takes 18 ms in pages of 4 KB, and 4 ms in pages of 2 MB.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    size = math.prod(shape) * tensor.element_size()
    advise = _advise() if size >= LEAST else None
    if advise is not None:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = (tensor.data_ptr() + size - begin) // mmap.PAGESIZE
        advise(begin, pages * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)  # may be refused: only slower then
    return tensor


_KINDS = {
    torch.bool: "|b1",
    torch.uint8: "|u1",
    torch.uint16: "<u2",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.float16: "<f2",
    torch.float32: "<f4",
    torch.float64: "<f8",
}


class _Lent:
    """A tensor's memory, as numpy asks for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # what holds the memory
        self.__array_interface__ = lent = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": _KINDS[tensor.dtype],
            "version": 3,
        }
        if not tensor.is_contiguous():
            size = tensor.element_size()
            lent["strides"] = tuple([size * stride for stride in tensor.stride()])


def array_of(tensor: Tensor) -> Any:
    """Return a tensor on a CPU as an array over its memory.

    ``Tensor.numpy`` would forbid anybody to resize that memory later, as sharded training does.
    """
    return np.asarray(_Lent(tensor))


@lru_cache
def _advise() -> Any:
    """Return the system's madvise, or None where it knows no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
