"""Dequantize NF4 in one pass over the bytes, the scales decoded on the way.

    out[i] = round_to_dtype(levels[code[i]] * absmax[i // block_size])

A result that is neither fp32 nor bf16 is rounded from fp32 by PyTorch. Equal to
nf4/reference/dequantize.py in every bit.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE, absmax_map, nf4_levels
from nf4.cpu._lanes import BF16, FP16, FP32, expand_block
from nf4.cpu._memory import array_of, new_empty
from nf4.cpu._threads import fork, spread
from nf4.reference.repack import repack
from nf4.tensor import Weight
from nf4.tools.caches import forgettable

GRAIN = 1 << 17  # elements worth a thread of their own: 20 microseconds of work
STRIP = 256  # blocks of a flat result that a thread takes at a time

_CODES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@compiled
def scale_of(scales, b):  # type: ignore[no-untyped-def]
    """Return the scale of block b: absmax, or where that is empty what its code stands for."""
    absmax, codes, absmax2, offset, scale_map = scales
    if len(absmax):
        return absmax[b]
    d = scale_map[codes[b]] * absmax2[b // ABSMAX_BLOCK_SIZE]
    return d + offset[0]


# The loop writes strips begin to end. Strip s takes the blocks first + s * stride and the next,
# `width` of them, to where out[s * pitch] begins; what lies beyond out is left off.
@compiled
def _loop(packed, levels, scales, half, dtype, form, out, begin, end):  # type: ignore[no-untyped-def]
    first, stride, width, pitch = form
    size = 2 * half
    last = np.empty(size, out.dtype)
    for s in range(begin, end):
        for i in range(min(width, (len(out) - s * pitch + size - 1) // size)):
            b, o = first + s * stride + i, s * pitch + i * size
            scale = scale_of(scales, b)
            if o + size <= len(out):
                _block(packed, levels, scale, half, dtype, b * half, out, o)
            else:  # the bytes of a partial block may end with it, those of a whole one do not
                count = len(out) - o
                bytes_ = np.zeros(half, np.uint8)
                for j in range((count + 1) // 2):
                    bytes_[j] = packed[b * half + j]
                _block(bytes_, levels, scale, half, dtype, 0, last, 0)
                out[o:] = last[:count]


@compiled
def _block(packed, levels, scale, half, dtype, p, out, o):  # type: ignore[no-untyped-def]
    """Expand a block; the compiler takes each dtype as a constant."""
    if dtype == BF16:
        expand_block(levels, scale, BF16, packed, p, half, out, o)
    elif dtype == FP16:
        expand_block(levels, scale, FP16, packed, p, half, out, o)
    else:
        expand_block(levels, scale, FP32, packed, p, half, out, o)


@compiled
def _share(packed, levels, scales, half, dtype, form, out, begin, end, team):  # type: ignore[no-untyped-def]
    args = (packed, levels, scales, half, dtype, form, out)
    fork(_loop, args, begin, end, team)


class Arrays(NamedTuple):
    """A weight in rows as numpy arrays; absmax or the other scales are empty."""

    packed: Any
    absmax: Any
    codes: Any
    absmax2: Any
    offset: Any
    block_size: int


_NO_SCALES, _NO_CODES = np.empty(0, np.float32), np.empty(0, np.uint8)


def _array(tensor: Tensor) -> Any:
    """Return a tensor as a flat array, without a copy if it is contiguous."""
    return array_of(tensor.detach().contiguous()).reshape(-1)


@forgettable
@lru_cache
def levels() -> Any:
    """Return the sixteen levels in fp32."""
    return nf4_levels(torch.device("cpu")).numpy()


@forgettable
@lru_cache
def scale_map() -> Any:
    """Return what the 256 codes of scales stand for, in fp32."""
    return absmax_map(torch.device("cpu")).numpy()


def as_arrays(weight: Weight) -> Arrays:
    """Return the parts of a weight as numpy arrays in rows, without a copy where that goes."""
    packed, absmax, absmax2, offset, _, block_size, _ = repack(weight, "rows")
    if absmax2 is None or offset is None:
        return Arrays(_array(packed), _array(absmax), _NO_CODES, _NO_SCALES, _NO_SCALES, block_size)
    scales = _array(absmax), _array(absmax2), _array(offset)
    return Arrays(_array(packed), _NO_SCALES, *scales, block_size)


def scales_of(weight: Arrays) -> tuple[Any, ...]:
    """Return what `scale_of` reads."""
    return weight.absmax, weight.codes, weight.absmax2, weight.offset, scale_map()


def dequantize_blocks(weight: Arrays, first: int, out: Tensor, dtype: torch.dtype) -> None:
    """Fill out with elements of a weight, from the first of block `first` on.

    Args:
        weight: to read from.
        first: a block.
        out: float32 or bfloat16, flat, contiguous.
        dtype: what the elements are rounded to; out holds it without loss.
    """
    blocks = -(-out.numel() // weight.block_size)
    form = (first, STRIP, STRIP, STRIP * weight.block_size)
    _run(weight, form, -(-blocks // STRIP), out, dtype)


def dequantize_columns(
    weight: Arrays, shape: tuple[int, int], columns: slice, out: Tensor, dtype: torch.dtype
) -> None:
    """Fill the left of out with columns of a weight.

    Args:
        weight: to read from.
        shape: N, K of W, whose rows are whole blocks.
        columns: which, whole blocks.
        out: float32 or bfloat16 ``[N, columns or more]``, contiguous.
        dtype: as in `dequantize_blocks`.
    """
    first, width = (x // weight.block_size for x in (columns.start, columns.stop - columns.start))
    form = (first, shape[1] // weight.block_size, width, out.stride(0))
    _run(weight, form, shape[0], out.view(-1), dtype)


def _run(
    weight: Arrays, form: tuple[int, int, int, int], strips: int, out: Tensor, dtype: torch.dtype
) -> None:
    """Run a loop over strips of the form first, stride, width, pitch; see there."""
    as_bf16 = out.dtype == torch.bfloat16
    spread(
        _share,
        range(strips),
        -(-GRAIN // (form[2] * weight.block_size)),
        weight.packed,
        levels(),
        scales_of(weight),
        weight.block_size // 2,
        _CODES.get(dtype, FP32),
        form,
        array_of(out.view(torch.uint16) if as_bf16 else out),
    )


def dequantize(weight: Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Dequantize to a dense tensor; arguments as in nf4/reference/dequantize.py."""
    arrays = as_arrays(weight)
    direct = dtype in (torch.float32, torch.bfloat16)
    if out is not None and direct and out.is_contiguous():
        dequantize_blocks(arrays, 0, out.view(-1), dtype)
        return out
    flat = new_empty((math.prod(weight.shape),), dtype if direct else torch.float32)
    dequantize_blocks(arrays, 0, flat, dtype)
    values = flat.to(dtype).view(tuple(weight.shape))
    return values if out is None else out.copy_(values)
