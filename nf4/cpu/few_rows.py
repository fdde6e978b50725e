"""Multiply a few rows by a quantized weight in one pass over its bytes; W is never written.

    y[m, n] = sum over blocks b of absmax[n, b] * sum over i in b of levels[code[n, i]] * x[m, i]

Sums are taken in fp32, many at a time, and the weight is not rounded to the dtype of x before: the
result is no further from the exact one than nf4/reference/linear.py's.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from nf4.codebook import nf4_byte_levels
from nf4.cpu._threads import spread
from nf4.cpu.dequantize import Weight, decoded_absmax

MOST_ROWS = 16
GRAIN = 1 << 18  # weights worth a thread of their own

# A sum may be taken in any order: that is what lets the compiler take many terms at a time. numba
# hands this on to what such a function calls, so these call nothing whose bits matter.
summing = numba.njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
)


@summing
def _one_row(packed, absmax, high, low, even, odd, half, y, begin, end):  # type: ignore[no-untyped-def]
    blocks = even.shape[1] // half
    x_even, x_odd = even[0], odd[0]
    for n in range(begin, end):
        total = np.float32(0)
        for b in range(blocks):
            bytes_ = packed[(n * blocks + b) * half : (n * blocks + b + 1) * half]
            e, o = x_even[b * half : (b + 1) * half], x_odd[b * half : (b + 1) * half]
            part = np.float32(0)
            for i in range(half):
                part += high[bytes_[i]] * e[i] + low[bytes_[i]] * o[i]
            total += part * absmax[n * blocks + b]
        y[0, n] = total


@summing
def _rows(packed, absmax, high, low, even, odd, half, y, begin, end):  # type: ignore[no-untyped-def]
    rows, blocks = len(even), even.shape[1] // half
    first, second = np.empty(half, np.float32), np.empty(half, np.float32)
    totals = np.empty(rows, np.float32)
    for n in range(begin, end):
        totals[:] = 0
        for b in range(blocks):
            bytes_ = packed[(n * blocks + b) * half : (n * blocks + b + 1) * half]
            scale = absmax[n * blocks + b]
            for i in range(half):
                first[i] = high[bytes_[i]]
                second[i] = low[bytes_[i]]
            for m in range(rows):
                e, o = even[m, b * half : (b + 1) * half], odd[m, b * half : (b + 1) * half]
                part = np.float32(0)
                for i in range(half):
                    part += first[i] * e[i] + second[i] * o[i]
                totals[m] += part * scale
        for m in range(rows):
            y[m, n] = totals[m]


def product(x: Tensor, weight: Weight, out_features: int) -> Tensor:
    """Return x @ W.T in fp32.

    Args:
        x: ``[M, K]``, M from 1 to 16 and K a multiple of the block size.
        weight: W ``[N, K]``, of `as_weight`.
        out_features: N.
    """
    m, k = x.shape
    halves = x.float().view(m, k // 2, 2)
    even, odd = (halves[..., i].contiguous().numpy() for i in (0, 1))
    tables = nf4_byte_levels(torch.device("cpu")).T.contiguous().numpy()
    y = torch.empty(m, out_features)
    spread(
        _one_row if m == 1 else _rows,
        range(out_features),
        -(-GRAIN // k),
        weight.packed,
        decoded_absmax(weight),
        tables[0],
        tables[1],
        even,
        odd,
        weight.block_size // 2,
        y.numpy(),
    )
    return y
