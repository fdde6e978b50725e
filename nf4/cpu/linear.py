"""Multiply by a quantized weight, a slab of its rows at a time: y = x @ W.T + bias, dx = dy @ W.

A few rows of x are multiplied in one pass over the bytes of W, see nf4/cpu/few_rows.py. For more,
a slab of W is dequantized into a buffer of 4 MB, multiplied, and overwritten by the next, so that W
is never whole in memory. Rounding as in nf4/reference/linear.py; sums of dx are taken slab by slab.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nf4.cpu import few_rows
from nf4.cpu.dequantize import as_weight, dequantize_blocks
from nf4.reference.linear import accumulator

SLAB = 1 << 20  # elements


def _slabs(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, int],
    block_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each slab and its values, rounded to dtype but held in its accumulator."""
    weight = as_weight(packed, absmax, absmax2, offset, shape, block_size, layout)
    rows, columns = shape
    step = -(-rows // max(1, rows * columns // SLAB))
    # A slab begins and ends inside blocks, unless these fit the rows.
    buffer = torch.empty(step * columns + 2 * block_size)
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        first, skip = divmod(begin * columns, block_size)
        end = skip + count * columns
        dequantize_blocks(weight, first, buffer[: end + end % 2])
        slab = buffer[skip:end].view(count, columns)
        if dtype != torch.float32:
            slab = slab.to(dtype).to(accumulator(dtype))
        yield slice(begin, begin + count), slab


def takes_few_rows(m: int, k: int, dtype: torch.dtype, block_size: int) -> bool:
    """Return whether x ``[m, k]`` is multiplied without writing W."""
    if dtype == torch.float64 or k == 0 or k % block_size:
        return False
    return 1 <= m <= few_rows.MOST_ROWS


def product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    block_size: int,
    layout: str,
) -> Tensor:
    """Return x @ W.T for x ``[M, K]``, fp32 (fp64 for fp64) and not yet rounded."""
    shape = (out_features, x.shape[1])
    m, k = x.shape
    if takes_few_rows(m, k, x.dtype, block_size):
        weight = as_weight(packed, absmax, absmax2, offset, shape, block_size, layout)
        return few_rows.product(x, weight, out_features)
    wide = x.to(accumulator(x.dtype))
    y = wide.new_empty(x.shape[0], out_features)
    for rows, w in _slabs(packed, absmax, absmax2, offset, shape, block_size, layout, x.dtype):
        torch.mm(wide, w.T, out=y[:, rows])
    return y


def product_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    layout: str,
) -> Tensor:
    """Return dy @ W for dy ``[M, N]``, fp32 (fp64 for fp64) and not yet rounded."""
    shape = (dy.shape[1], in_features)
    wide = dy.to(accumulator(dy.dtype))
    dx = wide.new_zeros(dy.shape[0], in_features)
    for rows, w in _slabs(packed, absmax, absmax2, offset, shape, block_size, layout, dy.dtype):
        dx.addmm_(wide[:, rows], w)
    return dx


def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
    layout: str = "rows",
) -> Tensor:
    """Return x @ W.T + bias; arguments as in nf4/reference/linear.py."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = product(rows, packed, absmax, absmax2, offset, out_features, block_size, layout)
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


def linear_backward(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    layout: str = "rows",
) -> Tensor:
    """Return dy @ W; arguments as in nf4/reference/linear.py."""
    rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    dx = product_backward(rows, packed, absmax, absmax2, offset, in_features, block_size, layout)
    return dx.to(dy.dtype).view(*dy.shape[:-1], in_features)
