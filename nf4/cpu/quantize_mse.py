"""Quantize to NF4 with the scale of least squared error, a block at a time.

What is computed is defined, and told, in nf4/reference/quantize_mse.py; equal to it in every bit.
"""

import numpy as np
import torch
from torch import Tensor

from nf4.codebook import LARGEST_ABSMAX, SMALLEST_ABSMAX, nf4_thresholds
from nf4.cpu._memory import array_of
from nf4.cpu._threads import fork, spread
from nf4.cpu.dequantize import compiled
from nf4.tools.scale_search import (
    CANDIDATES,
    IMPORTANCE_UNIT,
    LEVEL_UNIT,
    LEVELS,
    REFINEMENTS,
    X_UNIT,
)

SLAB = 1 << 20  # elements, whole blocks of every size
GRAIN = 1 << 13  # elements worth a thread of their own

_LEVELS = np.array(LEVELS, np.int32)
_INTO_V = np.float32(1 / X_UNIT)
_INTO_U = np.float32(1 / IMPORTANCE_UNIT)


@compiled
def _sums(v, u, weighted, sign, size, thresholds, levels, level, sums):  # type: ignore[no-untyped-def]
    """Write sum(u x l) and sum(u l^2) of the codes of a scale, in units, into sums."""
    for i in range(len(v)):
        level[i] = levels[0]
    for k in range(15):
        threshold = np.int32(np.floor(np.float64(thresholds[k]) * size))
        step = levels[k + 1] - levels[k]
        if sign > 0:
            for i in range(len(v)):
                level[i] += step * np.int32(v[i] > threshold)
        else:
            for i in range(len(v)):
                level[i] += step * np.int32(-v[i] > threshold)
    a = np.int64(0)
    b = np.int64(0)
    if weighted:
        for i in range(len(v)):
            a += np.int64(u[i]) * np.int64(v[i] * level[i])
            b += np.int64(u[i]) * np.int64(level[i] * level[i])
    else:
        for i in range(len(v)):
            a += np.int64(v[i] * level[i])
            b += np.int64(level[i] * level[i])
    sums[0], sums[1] = a * sign, b


@compiled
def _importance(weights, first, n, u):  # type: ignore[no-untyped-def]
    """Write what each element of a block counts into u, the block's first of n being ``first``."""
    largest = np.float32(0)
    for i in range(min(len(u), n - first)):
        largest = max(largest, weights[(first + i) % len(weights)])
    inverse = np.float32(0)
    if largest >= np.float32(SMALLEST_ABSMAX):
        inverse = np.float32(1) / largest
    for i in range(len(u)):
        h = weights[(first + i) % len(weights)] * inverse
        u[i] = max(np.int32(np.rint(h * _INTO_U)), np.int32(1))


@compiled
def _loop(x, n, weights, thresholds, levels, ratios, signed, block_size, codes, absmax, begin, end):  # type: ignore[no-untyped-def]
    v = np.empty(block_size, np.int32)
    u = np.empty(block_size, np.int32)
    weighted = len(weights) > 0
    level = np.empty(block_size, np.int32)
    scaled = np.empty(block_size, np.float32)
    sums = np.empty(2, np.int64)
    for block in range(begin, end):
        values = x[block * block_size : (block + 1) * block_size]
        largest = np.float32(0)
        finite = True
        for i in range(block_size):
            finite &= np.isfinite(values[i])
            largest = max(largest, abs(values[i]))
        if not finite:  # a NaN or an infinity, as the reference's largest magnitude is
            largest = np.float32(np.inf)
            for i in range(block_size):
                if np.isnan(values[i]):
                    largest = np.float32(np.nan)
        if largest < np.float32(SMALLEST_ABSMAX):
            largest = np.float32(0)
        scale = largest
        if finite and largest != np.float32(0):
            inverse = np.float32(1) / largest
            for i in range(block_size):
                v[i] = np.int32(np.rint((values[i] * inverse) * _INTO_V))
            if weighted:
                _importance(weights, block * block_size, n, u)
            best, ratio = 0.0, 1.0
            for trial in range(len(ratios) * (2 if signed else 1) + REFINEMENTS):
                if trial < len(ratios):
                    tried = ratios[trial]
                elif signed and trial < 2 * len(ratios):
                    tried = -ratios[trial - len(ratios)]
                else:
                    tried = ratio
                sign = 1 if tried > 0 else -1
                _sums(v, u, weighted, sign, abs(tried) / X_UNIT, thresholds, levels, level, sums)
                a, b = np.float64(sums[0]), np.float64(sums[1])
                found = a * a / b
                if found > best and a > 0:
                    best = found
                    ratio = sign * (a / b) * (X_UNIT / LEVEL_UNIT)
            exact = min(max(np.float64(largest) * ratio, -LARGEST_ABSMAX), LARGEST_ABSMAX)
            scale = np.float32(exact)
        absmax[block] = scale
        inverse = np.float32(0)
        if scale != np.float32(0):
            inverse = np.float32(1) / scale
        for i in range(block_size):
            scaled[i] = values[i] * inverse
            level[i] = 0
        for k in range(15):
            threshold = thresholds[k]
            for i in range(block_size):
                level[i] += np.int32(scaled[i] > threshold)
        out = codes[block * block_size : (block + 1) * block_size]
        for i in range(block_size):
            out[i] = level[i]


@compiled
def _share(args, begin, end, team):  # type: ignore[no-untyped-def]
    fork(_loop, args, begin, end, team)


def quantize_mse(
    w: Tensor,
    block_size: int,
    signed: bool,
    weights: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize w; arguments and results as in nf4/reference/quantize_mse.py."""
    x = w.detach().reshape(-1)
    n = x.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device="cpu")
    thresholds = np.array(nf4_thresholds(), np.float32)
    ratios = np.array(CANDIDATES)
    columns = np.empty(0, np.float32)
    if weights is not None:
        columns = array_of(weights.detach().contiguous())
    for begin in range(0, n, SLAB):
        slab = x[begin : begin + SLAB].float().contiguous()
        count = slab.numel()
        blocks = -(-count // block_size)
        if count % block_size:
            slab = torch.nn.functional.pad(slab, (0, blocks * block_size - count))
        codes = torch.empty(blocks * block_size, dtype=torch.uint8, device="cpu")
        args = (
            array_of(slab),
            count,
            np.roll(columns, -begin % len(columns)) if len(columns) else columns,
            thresholds,
            _LEVELS,
            ratios,
            signed,
            block_size,
            array_of(codes),
            array_of(absmax[begin // block_size :]),
        )
        spread(_share, range(blocks), max(GRAIN // block_size, 1), args)
        codes = codes[: count + count % 2]
        packed[begin // 2 : begin // 2 + len(codes) // 2] = codes[0::2] << 4 | codes[1::2]
    return (packed, absmax) if out is None else (out[0].copy_(packed), out[1].copy_(absmax))
