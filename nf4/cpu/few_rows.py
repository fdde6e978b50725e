"""Multiply a few rows by a quantized weight in one pass over its bytes; W is never written.

    y[m, n] = sum over i of levels[code[n, i]] * absmax[n, block of i] * x[m, i]

Sums are taken in fp32, 32 at a time and always in the same order, and the weight is not rounded to
the dtype of x before: the result is no further from the exact one than nf4/reference/linear.py's.
"""

import numpy as np
import torch
from torch import Tensor

from nf4.cpu._lanes import dot_row
from nf4.cpu._threads import fork, spread
from nf4.cpu.dequantize import Weight, compiled, levels, scale_of, scales_of

# Rows of x that a pass over W serves, as constants to the compiler, which keeps their sums in
# registers; more rows do not fit the nearest cache.
_FOUR, _TWO, _ONE = 4, 2, 1
GRAIN = 1 << 17  # weights worth a thread of their own: 10 microseconds of work


@compiled
def _loop(packed, table, scales, half, x, y, begin, end):  # type: ignore[no-untyped-def]
    rows, k = len(x), x.shape[1] // 2
    blocks = k // half
    even, odd = np.empty((rows, k), np.float32), np.empty((rows, k), np.float32)
    for m in range(rows):
        for i in range(k):
            even[m, i] = x[m, 2 * i]
            odd[m, i] = x[m, 2 * i + 1]
    absmax, sums = np.empty(blocks, np.float32), np.empty(_FOUR, np.float32)
    m = 0
    while m < rows:
        group = _FOUR if rows - m >= _FOUR else _TWO if rows - m >= _TWO else _ONE
        e, o = even[m : m + group], odd[m : m + group]
        for n in range(begin, end):
            for b in range(blocks):
                absmax[b] = scale_of(scales, n * blocks + b)
            p = n * k
            if group == _FOUR:
                dot_row(table, packed, p, absmax, 0, blocks, half, e, o, k, _FOUR, sums)
            elif group == _TWO:
                dot_row(table, packed, p, absmax, 0, blocks, half, e, o, k, _TWO, sums)
            else:
                dot_row(table, packed, p, absmax, 0, blocks, half, e, o, k, _ONE, sums)
            for i in range(group):
                y[m + i, n] = sums[i]
        m += group


@compiled
def _share(args, begin, end, team):  # type: ignore[no-untyped-def]
    fork(_loop, args, begin, end, team)


def product(x: Tensor, weight: Weight, out_features: int) -> Tensor:
    """Return x @ W.T in fp32.

    Args:
        x: ``[M, K]``, K a multiple of the block size.
        weight: W ``[N, K]``, of `as_weight`.
        out_features: N.
    """
    m, k = x.shape
    y = torch.empty(m, out_features)
    spread(
        _share,
        range(out_features),
        -(-GRAIN // k),
        weight.packed,
        levels(),
        scales_of(weight),
        weight.block_size // 2,
        x.detach().float().contiguous().numpy(),
        y.numpy(),
    )
    return y
