"""Quantize to NF4 with the scale of least squared error in one pass, a block in registers.

What is computed is told in nf4/reference/quantize_mse.py. Of each trial only two integer sums leave
the block's elements, so that the order of adding does not matter; thresholds and scores are taken
in float64, a few a block. Moves 2 bytes in and 0.5 out an element (bf16), but is bound by
arithmetic: 30 compares and adds an element and trial, 54 trials.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import LARGEST_ABSMAX, SMALLEST_ABSMAX, nf4_thresholds
from ..tools.caches import forgettable
from ..tools.scale_search import (
    CANDIDATES,
    IMPORTANCE_UNIT,
    LEVEL_STEPS,
    LEVEL_UNIT,
    LEVELS,
    REFINEMENTS,
    X_UNIT,
    candidates,
)
from ._aot import Variant
from ._encode import bucket_bases, bucket_thresholds, encode, reciprocal
from ._launch import Launch
from .quantize import _larger

TILE = 2048
SMALLEST = tl.constexpr(SMALLEST_ABSMAX)
LARGEST = tl.constexpr(LARGEST_ABSMAX)
THRESHOLDS = tl.constexpr(nf4_thresholds())
STEPS = tl.constexpr(LEVEL_STEPS)
LOWEST = tl.constexpr(LEVELS[0])
INTO_V = tl.constexpr(1 / X_UNIT)
INTO_U = tl.constexpr(1 / IMPORTANCE_UNIT)
INTO_RATIO = tl.constexpr(X_UNIT / LEVEL_UNIT)
ROUNDS = tl.constexpr(1.5 * 2.0**23)  # added and taken off again, leaves the nearest integer


@triton.jit
def _quantize_mse_kernel(
    x_ptr,  # float32, float16 or bfloat16 [n]
    packed_ptr,  # uint8 [ceil(n / 2)]
    absmax_ptr,  # float32 [ceil(n / BLOCK_SIZE)]
    thresholds_ptr,  # float32 [32]
    bases_ptr,  # int32 [32]
    candidates_ptr,  # float64 [CANDIDATES]
    weights_ptr,  # float32 [columns], not read unless WEIGHTED
    n,
    columns,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # blocks a program
    CANDIDATES: tl.constexpr,
    SIGNED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    REFINEMENTS: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    offs = rows[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # [ROWS, BLOCK_SIZE]
    left = n - first * BLOCK_SIZE
    x = tl.load(x_ptr + first * BLOCK_SIZE + offs, mask=offs < left, other=0.0).to(tl.float32)
    absmax = tl.reduce(tl.abs(x), 1, _larger)
    absmax = tl.where(absmax < SMALLEST, 0.0, absmax)
    usable = (absmax > 0.0) & (absmax < float("inf"))
    inverse = reciprocal(tl.where(usable, absmax, 1.0), SHUFFLE)
    scaled = tl.where(usable[:, None], x * inverse[:, None], 0.0)
    v = (scaled * INTO_V + ROUNDS - ROUNDS).to(tl.int32)
    if WEIGHTED:
        column = (((first * BLOCK_SIZE) % columns).to(tl.int32) + offs) % columns
        h = tl.load(weights_ptr + column, mask=offs < left, other=0.0)
        most = tl.reduce(h, 1, _larger)
        inverse = reciprocal(tl.where(most < SMALLEST, 1.0, most), SHUFFLE)
        h = tl.where(most[:, None] < SMALLEST, 0.0, h * inverse[:, None])
        u = tl.maximum((h * INTO_U + ROUNDS - ROUNDS).to(tl.int32), 1).to(tl.int64)
    best = tl.zeros([ROWS], tl.float64)
    ratio = best + 1.0
    signs: tl.constexpr = 2 if SIGNED else 1
    for trial in range(signs * CANDIDATES + REFINEMENTS):
        searched = trial < signs * CANDIDATES
        candidate = tl.load(candidates_ptr + trial % CANDIDATES)
        candidate = tl.where(trial < CANDIDATES, candidate, -candidate)
        tried = tl.where(searched, candidate, ratio)
        sign = tl.where(tried > 0, 1, -1)
        size = tl.abs(tried) * INTO_V
        turned = v * sign[:, None]
        level = tl.full([ROWS, BLOCK_SIZE], LOWEST, tl.int32)
        for k in tl.static_range(15):
            threshold = tl.floor(size * THRESHOLDS[k]).to(tl.int32)
            level += tl.where(turned > threshold[:, None], STEPS[k], 0)
        if WEIGHTED:
            a = tl.sum((turned * level).to(tl.int64) * u, axis=1).to(tl.float64)
            b = tl.sum((level * level).to(tl.int64) * u, axis=1).to(tl.float64)
        elif BLOCK_SIZE <= 128:  # sums below 2^31
            a = tl.sum(turned * level, axis=1).to(tl.float64)
            b = tl.sum(level * level, axis=1).to(tl.float64)
        else:
            a = tl.sum((turned * level).to(tl.int64), axis=1).to(tl.float64)
            b = tl.sum((level * level).to(tl.int64), axis=1).to(tl.float64)
        b = tl.maximum(b, 1.0)  # of a block of zeros
        found = a * a / b
        better = (found > best) & (a > 0)
        best = tl.where(better, found, best)
        ratio = tl.where(better, sign * (a / b) * INTO_RATIO, ratio)
    scale = (absmax.to(tl.float64) * ratio).to(tl.float32)
    scale = tl.where(usable, tl.minimum(tl.maximum(scale, -LARGEST), LARGEST), absmax)
    tl.store(absmax_ptr + first + rows, scale, mask=rows * BLOCK_SIZE < left)
    inverse = reciprocal(tl.where(scale == 0.0, 1.0, scale), SHUFFLE)
    # What a smaller scale cuts off has the code of the highest or the lowest level
    cut = tl.minimum(tl.where(scale[:, None] == 0.0, 0.0, x * inverse[:, None]), 1.0)
    even, odd = tl.split(cut.reshape([ROWS, BLOCK_SIZE // 2, 2]))
    high = encode(even, thresholds_ptr, bases_ptr, SHUFFLE)
    low = encode(odd, thresholds_ptr, bases_ptr, SHUFFLE)
    packed = ((high << 4) | low).to(tl.uint8)
    byte_offs = rows[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    packed_ptrs = packed_ptr + first * (BLOCK_SIZE // 2) + byte_offs
    tl.store(packed_ptrs, packed, mask=2 * byte_offs < left)


def quantize_mse(
    w: Tensor,
    block_size: int,
    signed: bool,
    weights: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize w; arguments and results as in nf4/reference/quantize_mse.py."""
    x = w.contiguous()
    n = x.numel()
    if out is None:
        packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
        absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    else:
        packed, absmax = out
    if n:
        _form(block_size, signed, weights is not None)(
            (-(-n // max(TILE, block_size)),),
            x,
            packed,
            absmax,
            bucket_thresholds(x.device),
            bucket_bases(x.device),
            candidates(x.device),
            None if weights is None else weights.contiguous(),
            n,
            1 if weights is None else x.shape[-1],
        )
    return packed, absmax


@forgettable
@lru_cache
def _form(block_size: int, signed: bool, weighted: bool) -> Launch:
    constants = {
        "BLOCK_SIZE": block_size,
        "ROWS": max(TILE // block_size, 1),
        "CANDIDATES": len(CANDIDATES),
        "SIGNED": signed,
        "WEIGHTED": weighted,
        "REFINEMENTS": REFINEMENTS,
    }
    return Launch(_quantize_mse_kernel, constants)


def variants() -> list[Variant]:
    """Return the compilations to report on: instructions an element and trial, and the rest."""
    return [
        Variant(
            f"quantize_mse, block {block_size}, bf16" + ", weighted" * weighted,
            _form(block_size, True, weighted),
            max(TILE, block_size),
            {"absmax_ptr": "*fp32"},
        )
        for block_size, weighted in ((64, False), (4096, False), (64, True))
    ]
