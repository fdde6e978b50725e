"""Double quantization in two launches: the mean of the scales, then their 8-bit codes.

    offset = mean(absmax)          d = absmax - offset          absmax2[j] = max |d| over block j
    code[i] = the entry of the 256-entry map nearest to d[i] * (1 / absmax2); a tie takes the lower

The first launch leaves up to 256 partial sums in float64; every program of the second adds them up
in the same order. float64 makes the rounded mean that of nf4/reference/quantize_absmax.py whatever
the order. Codes are found by bisection of the 255 thresholds. Moves 4 bytes in twice and 1 out.
Source: QLoRA, section 3 (https://arxiv.org/abs/2305.14314).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import (
    ABSMAX_BLOCK_SIZE,
    LARGEST_ABSMAX,
    SMALLEST_ABSMAX,
    absmax_thresholds,
)
from ._aot import Variant
from ._launch import Launch

PARTS = 256
TILE = 1024
SMALLEST = tl.constexpr(SMALLEST_ABSMAX)
LARGEST = tl.constexpr(LARGEST_ABSMAX)


@triton.jit
def _sum_kernel(
    absmax_ptr,  # float32 [blocks]
    parts_ptr,  # float64 [PARTS]
    blocks,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    total = tl.zeros([TILE], tl.float64)
    begin = tl.program_id(0).to(tl.int64) * TILE
    for start in range(begin, blocks, PARTS * TILE):
        offs = start + tl.arange(0, TILE)
        total += tl.load(absmax_ptr + offs, mask=offs < blocks, other=0.0).to(tl.float64)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _quantize_absmax_kernel(
    absmax_ptr,  # float32 [blocks]
    parts_ptr,  # float64 [PARTS]
    thresholds_ptr,  # float32 [255]
    codes_ptr,  # uint8 [blocks]
    absmax2_ptr,  # float32 [ceil(blocks / BLOCK)]
    offset_ptr,  # float32 []
    blocks,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,  # scales that share one absmax2
):
    mean = tl.sum(tl.load(parts_ptr + tl.arange(0, PARTS)), axis=0) / blocks
    offset = mean.to(tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < blocks
    absmax = tl.load(absmax_ptr + offs, mask=mask, other=0.0)
    from_mean = tl.zeros([BLOCK], tl.float32) + offset
    finite = (tl.abs(absmax) <= LARGEST) & (tl.abs(from_mean) <= LARGEST)
    d = absmax - from_mean
    d = tl.where(finite, tl.minimum(tl.maximum(d, -LARGEST), LARGEST), d)
    d = tl.where(mask, d, 0.0)
    absmax2 = tl.max(tl.abs(d), axis=0)
    absmax2 = tl.where(absmax2 < SMALLEST, 0.0, absmax2)
    scaled = tl.where(absmax2 == 0.0, 0.0, d)
    scaled *= tl.math.div_rn(1.0, tl.where(absmax2 == 0.0, 1.0, absmax2))
    code = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(8):
        higher = code + (128 >> i)
        code = tl.where(scaled > tl.load(thresholds_ptr + higher - 1), higher, code)
    tl.store(codes_ptr + offs, code.to(tl.uint8), mask=mask)
    tl.store(absmax2_ptr + pid, absmax2)
    if pid == 0:
        tl.store(offset_ptr, offset)


def quantize_absmax(
    absmax: Tensor, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales; arguments and results as in nf4/reference/quantize_absmax.py."""
    blocks, device = absmax.numel(), absmax.device
    parts2 = -(-blocks // ABSMAX_BLOCK_SIZE)
    if out is None:
        codes = torch.empty(blocks, dtype=torch.uint8, device=device)
        absmax2 = torch.empty(parts2, dtype=torch.float32, device=device)
        offset = torch.empty((), dtype=torch.float32, device=device)
    else:
        codes, absmax2, offset = out
    if not blocks:
        return codes, absmax2, offset.zero_()
    parts = torch.empty(PARTS, dtype=torch.float64, device=device)
    _SUM((PARTS,), absmax, parts, blocks)
    thresholds = absmax_thresholds(device)
    _CODES((parts2,), absmax, parts, thresholds, codes, absmax2, offset, blocks)
    return codes, absmax2, offset


_SUM = Launch(_sum_kernel, {"PARTS": PARTS, "TILE": TILE})
_CODES = Launch(_quantize_absmax_kernel, {"PARTS": PARTS, "BLOCK": ABSMAX_BLOCK_SIZE})


def variants() -> list[Variant]:
    """Return the compilations to report on; instructions are per scale."""
    types = {"absmax_ptr": "*fp32", "parts_ptr": "*fp64"}
    return [
        Variant("quantize_absmax, sum", _SUM, TILE, types),
        Variant("quantize_absmax, codes", _CODES, ABSMAX_BLOCK_SIZE, types),
    ]
