"""Multiply a few rows by a quantized weight in one pass over its bytes; W is never written.

    y[m, n] = sum over i of levels[code[n, i]] * absmax[n, block of i] * x[m, i] + bias[n]

Sums are taken in fp32, 32 at a time and always in the same order, and the weight is not rounded to
the dtype of x before: the result is no further from the exact one than nf4/reference/linear.py's.
A small product takes less time than to make arrays of seven tensors: they go by their addresses.
"""

import numpy as np
import torch
from numba import carray
from torch import Tensor

from nf4.cpu._lanes import dot_row, pointer
from nf4.cpu._threads import fork, spread
from nf4.cpu.dequantize import compiled, levels, scale_map, scale_of
from nf4.tensor import Weight

# Rows of x that a pass over W serves, as constants to the compiler, which keeps their sums in
# registers; more rows do not fit the nearest cache.
_FOUR, _TWO, _ONE = 4, 2, 1
GRAIN = 1 << 17  # weights worth a thread of their own: 10 microseconds of work


@compiled
def _loop(packed, table, scales, half, x, x_bf16, bias, y, y_bf16, begin, end):  # type: ignore[no-untyped-def]
    rows, k = max(len(x), len(x_bf16)), max(x.shape[1], x_bf16.shape[1]) // 2
    blocks = k // half
    even, odd = np.empty((rows, k), np.float32), np.empty((rows, k), np.float32)
    _split(x, x_bf16, even, odd)
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
            if len(bias):
                for i in range(group):
                    sums[i] += bias[n]
            for i in range(group):
                if len(y):
                    y[m + i, n] = sums[i]
                else:
                    y_bf16[m + i, n] = _to_bf16(sums.view(np.uint32)[i])
        m += group


@compiled
def _split(x, x_bf16, even, odd):  # type: ignore[no-untyped-def]
    """Write the even and the odd columns of x in fp32."""
    rows, k = even.shape
    if len(x):
        for m in range(rows):
            for i in range(k):
                even[m, i], odd[m, i] = x[m, 2 * i], x[m, 2 * i + 1]
    else:
        even_bits, odd_bits = even.view(np.uint32), odd.view(np.uint32)
        for m in range(rows):
            for i in range(k):
                even_bits[m, i] = np.uint32(x_bf16[m, 2 * i]) << np.uint32(16)
                odd_bits[m, i] = np.uint32(x_bf16[m, 2 * i + 1]) << np.uint32(16)


@compiled
def _to_bf16(bits):  # type: ignore[no-untyped-def]
    """Round the bits of an fp32 to bf16, to nearest even; a NaN becomes the quiet one."""
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    half = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.uint16((bits + half) >> np.uint32(16))


# Addresses: packed, absmax, absmax2 or 0, offset or 0, bias or 0, x, y. Sizes: rows of x, N, K,
# block size, whether x and y are bf16.
@compiled
def _share(addresses, sizes, table, scale_map, begin, end, team):  # type: ignore[no-untyped-def]
    at_packed, at_absmax, at_absmax2, at_offset, at_bias, at_x, at_y = addresses
    rows, n, k, block_size, x_bf16, y_bf16 = sizes
    blocks = n * (k // block_size)
    nested = 0 if at_absmax2 == 0 else 1
    scales = (
        carray(pointer(at_absmax), (blocks * (1 - nested),), np.float32),
        carray(pointer(at_absmax), (blocks * nested,), np.uint8),
        carray(pointer(at_absmax2), (nested,), np.float32),
        carray(pointer(at_offset), (nested,), np.float32),
        scale_map,
    )
    packed = carray(pointer(at_packed), (n * (k // 2),), np.uint8)
    bias = carray(pointer(at_bias), (0 if at_bias == 0 else n,), np.float32)
    x = carray(pointer(at_x), (rows * (1 - x_bf16), k), np.float32)
    x16 = carray(pointer(at_x), (rows * x_bf16, k), np.uint16)
    y = carray(pointer(at_y), (rows * (1 - y_bf16), n), np.float32)
    y16 = carray(pointer(at_y), (rows * y_bf16, n), np.uint16)
    args = (packed, table, scales, block_size // 2, x, x16, bias, y, y16)
    fork(_loop, args, begin, end, team)


def product(x: Tensor, weight: Weight, bias: Tensor | None, rounded: bool = True) -> Tensor:
    """Return x @ W.T + bias.

    Args:
        x: float32, bfloat16 or float16 ``[M, K]``, K a multiple of the block size.
        weight: W ``[N, K]`` in rows.
        bias: floating ``[N]`` or None.
        rounded: to the dtype of x; the result is float32 otherwise.
    """
    m, (n, k) = len(x), weight.shape
    x = x.resolve_neg()
    dtype = x.dtype if rounded else torch.float32
    if x.dtype == torch.float16:
        x = x.float()
    held = torch.float32 if dtype == torch.float16 else dtype
    y = torch.empty(m, n, dtype=held, device="cpu")
    if bias is not None:
        bias = bias.float().resolve_neg()
    kept = [None if t is None else t.contiguous() for t in (*weight[:4], bias, x)]
    addresses = tuple([0 if t is None else t.data_ptr() for t in (*kept, y)])
    is_bf16 = (int(x.dtype == torch.bfloat16), int(y.dtype == torch.bfloat16))
    sizes = (m, n, k, weight.block_size, *is_bf16)
    spread(_share, range(n), -(-GRAIN // k), addresses, sizes, levels(), scale_map())
    return y.to(dtype)
