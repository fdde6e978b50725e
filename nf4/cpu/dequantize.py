"""Dequantize NF4 in one pass over the bytes, the scales decoded on the way.

    out[i] = round_to_dtype(levels[code[i]] * absmax[i // block_size])

A result that is neither fp32 nor bf16 is rounded from fp32 by PyTorch. Equal to
nf4/reference/dequantize.py in every bit.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE, absmax_map, nf4_levels
from nf4.cpu._threads import spread
from nf4.reference.repack import repack

# Elements worth a thread of their own: 2 ms of work, against 0.05 ms to wake one.
GRAIN = 1 << 22

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@compiled
def scale_of(scales, b):  # type: ignore[no-untyped-def]
    """Return the scale of block b: absmax, or where that is empty what its code stands for."""
    absmax, codes, absmax2, offset, scale_map = scales
    if len(absmax):
        return absmax[b]
    d = scale_map[codes[b]] * absmax2[b // ABSMAX_BLOCK_SIZE]
    return d + offset[0]


@compiled
def _to_bf16(bits):  # type: ignore[no-untyped-def]
    """Round the bits of an fp32 to bf16, to nearest even; a NaN becomes the quiet one."""
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    half = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.uint16((bits + half) >> np.uint32(16))


@compiled
def _absmax_loop(scales, out, begin, end):  # type: ignore[no-untyped-def]
    for b in range(begin, end):
        out[b] = scale_of(scales, b)


# The loops write blocks begin to end; out[0] is the first element of block `first`, and what lies
# beyond out, of an even size, is left off. Slices spare the loops inside checks for indices < 0.
@compiled
def _to_fp32_loop(packed, levels, scales, block_size, first, out, begin, end):  # type: ignore[no-untyped-def]
    for b in range(begin, end):
        scale = scale_of(scales, b)
        bytes_ = packed[b * block_size // 2 :]
        block = out[(b - first) * block_size : (b - first + 1) * block_size]
        for i in range(len(block) // 2):
            byte = bytes_[i]
            block[2 * i] = levels[byte >> 4] * scale
            block[2 * i + 1] = levels[byte & 15] * scale


@compiled
def _to_bf16_loop(packed, levels, scales, block_size, first, out, begin, end):  # type: ignore[no-untyped-def]
    exact = np.empty(block_size, np.float32)
    bits = exact.view(np.uint32)
    for b in range(begin, end):
        scale = scale_of(scales, b)
        bytes_ = packed[b * block_size // 2 :]
        block = out[(b - first) * block_size : (b - first + 1) * block_size]
        for i in range(len(block) // 2):
            byte = bytes_[i]
            exact[2 * i] = levels[byte >> 4] * scale
            exact[2 * i + 1] = levels[byte & 15] * scale
        for i in range(len(block)):
            block[i] = _to_bf16(bits[i])


class Weight(NamedTuple):
    """A quantized weight as numpy arrays; absmax or the other scales are empty."""

    packed: Any
    absmax: Any
    codes: Any
    absmax2: Any
    offset: Any
    block_size: int


def _array(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Any:
    if tensor is None:
        tensor = torch.empty(0, dtype=dtype)
    return tensor.detach().reshape(-1).numpy()


def as_weight(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    layout: str,
) -> Weight:
    """Return the parts of a weight in rows as numpy arrays, without a copy where that goes."""
    if layout == "fragments":
        n, k = shape
        packed, absmax = repack(packed, absmax, n, k, "rows")
    nested = absmax2 is not None
    fp32, codes = (None, absmax) if nested else (absmax, None)
    return Weight(
        _array(packed),
        _array(fp32),
        _array(codes, torch.uint8),
        _array(absmax2),
        _array(offset),
        block_size,
    )


def scales_of(weight: Weight) -> tuple[Any, ...]:
    """Return what `scale_of` reads."""
    scale_map = _array(absmax_map(torch.device("cpu")))
    return weight.absmax, weight.codes, weight.absmax2, weight.offset, scale_map


def decoded_absmax(weight: Weight) -> Any:
    """Return the fp32 scale of each block."""
    if len(weight.absmax):
        return weight.absmax
    out = np.empty(len(weight.codes), np.float32)
    spread(_absmax_loop, range(len(out)), GRAIN // 64, scales_of(weight), out)
    return out


def dequantize_blocks(weight: Weight, first: int, out: Tensor) -> None:
    """Fill out with elements of a weight, from the first of block `first` on.

    Args:
        weight: of `as_weight`.
        first: a block.
        out: float32 or bfloat16, flat, contiguous, of an even size.
    """
    cpu = torch.device("cpu")
    block_size = weight.block_size
    as_bf16 = out.dtype == torch.bfloat16
    spread(
        _to_bf16_loop if as_bf16 else _to_fp32_loop,
        range(first, first - (-out.numel() // block_size)),
        GRAIN // block_size,
        weight.packed,
        _array(nf4_levels(cpu)),
        scales_of(weight),
        block_size,
        first,
        (out.view(torch.uint16) if as_bf16 else out).numpy(),
    )


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    layout: str = "rows",
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize to a dense tensor; arguments as in nf4/reference/dequantize.py."""
    n = math.prod(shape)
    weight = as_weight(packed, absmax, absmax2, offset, shape, block_size, layout)
    direct = dtype in (torch.float32, torch.bfloat16)
    if out is not None and direct and out.is_contiguous() and n % 2 == 0:
        dequantize_blocks(weight, 0, out.view(-1))
        return out
    flat = torch.empty(n + n % 2, dtype=dtype if direct else torch.float32)
    dequantize_blocks(weight, 0, flat)
    values = flat[:n].to(dtype, copy=n % 2 == 1).view(tuple(shape))
    return values if out is None else out.copy_(values)
