"""Multiply a few rows by a quantized weight in one pass over its bytes; W is never written.

    y[m, n] = sum over i of levels[code[n, i]] * absmax[n, block of i] * x[m, i]

Sums are taken in fp32, 32 at a time and always in the same order, and the weight is not rounded to
the dtype of x before: the result is no further from the exact one than nf4/reference/linear.py's.
"""

from typing import Any

import numpy as np
import torch
from numba import literally
from torch import Tensor

from nf4.codebook import nf4_levels
from nf4.cpu._lanes import dot_row
from nf4.cpu._threads import spread
from nf4.cpu.dequantize import Weight, compiled, decoded_absmax

GROUPS = (4, 2, 1)  # rows of x that a pass over W serves; more do not fit the nearest cache
GRAIN = 1 << 20  # weights worth a thread of their own


@compiled
def _loop(packed, levels, absmax, blocks, half, even, odd, group, y, begin, end):  # type: ignore[no-untyped-def]
    sums = np.empty(4, np.float32)
    k = blocks * half
    for n in range(begin, end):
        dot_row(levels, packed, n * k, absmax, n * blocks, blocks, half, even, odd, k, group, sums)
        for m in range(len(y)):
            y[m, n] = sums[m]


# A group is a constant to the compiler: its sums stay in registers.
@compiled
def _rows_of_4(packed, levels, absmax, blocks, half, even, odd, y, begin, end):  # type: ignore[no-untyped-def]
    _loop(packed, levels, absmax, blocks, half, even, odd, literally(4), y, begin, end)


@compiled
def _rows_of_2(packed, levels, absmax, blocks, half, even, odd, y, begin, end):  # type: ignore[no-untyped-def]
    _loop(packed, levels, absmax, blocks, half, even, odd, literally(2), y, begin, end)


@compiled
def _rows_of_1(packed, levels, absmax, blocks, half, even, odd, y, begin, end):  # type: ignore[no-untyped-def]
    _loop(packed, levels, absmax, blocks, half, even, odd, literally(1), y, begin, end)


_LOOPS = dict(zip(GROUPS, (_rows_of_4, _rows_of_2, _rows_of_1), strict=True))


def product(x: Tensor, weight: Weight, out_features: int) -> Tensor:
    """Return x @ W.T in fp32.

    Args:
        x: ``[M, K]``, K a multiple of the block size.
        weight: W ``[N, K]``, of `as_weight`.
        out_features: N.
    """
    m, k = x.shape
    halves = x.float().view(m, k // 2, 2)
    even, odd = (halves[..., i].contiguous().numpy() for i in (0, 1))
    levels: Any = nf4_levels(torch.device("cpu")).numpy()
    absmax = decoded_absmax(weight)
    y = torch.empty(m, out_features)
    done = 0
    while done < m:
        group = next(g for g in GROUPS if g <= m - done)
        rows = slice(done, done + group)
        spread(
            _LOOPS[group],
            range(out_features),
            -(-GRAIN // k),
            weight.packed,
            levels,
            absmax,
            k // weight.block_size,
            weight.block_size // 2,
            even[rows],
            odd[rows],
            y[rows].numpy(),
        )
        done += group
    return y
