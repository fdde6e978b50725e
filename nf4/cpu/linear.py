"""Multiply by a quantized weight without ever holding it dense: y = x @ W.T + bias, dx = dy @ W.

    rows of x      what runs
    few            one pass over the bytes of W, see nf4/cpu/few_rows.py
    more, bf16     where the CPU multiplies in bf16: slabs of W in bf16, sums in fp32, rounded once
    more           slabs of W, rounded to the dtype of x, held and summed in fp32 (fp64 for fp64)

A slab of W is dequantized into at most 12 MB, multiplied, and overwritten later. What goes
to fp32 goes some rows at a time: beyond inputs and outputs memory stays below 64 MiB.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from nf4.cpu import few_rows
from nf4.cpu._memory import new_empty
from nf4.cpu.dequantize import Arrays, as_arrays, dequantize_blocks, dequantize_columns
from nf4.cpu.plan import choose, has_column_slabs
from nf4.reference.linear import accumulator
from nf4.reference.repack import repack
from nf4.tensor import Weight
from nf4.tools.rows import as_rows, unflattened
from nf4.tools.scratch import scratch

# Bytes: within the last cache of a server's CPU, and few. Each product of a slab wakes PyTorch's
# threads and waits for all of them, on a busy machine for milliseconds.
SLAB = 12 << 20
# Bytes that slabs are taken from in turn. Where the last one was, lines are in the caches of all
# cores that multiplied by it: to write there again takes twice as long.
ARENA = 2 * SLAB
WIDE = 1 << 21  # elements of x, or of sums, held in fp32 at a time


def _row_slabs(
    weight: Arrays, shape: tuple[int, int], dtype: torch.dtype, held: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows of W at a time and their values, rounded to a dtype and held in another."""
    rows, columns = shape
    step = max(1, -(-rows // max(1, rows * columns * held.itemsize // SLAB)))
    # A slab begins inside a block, unless these fit the rows.
    size = step * columns + weight.block_size
    for begin in range(0, rows, step):
        buffer = _slab(size, held)
        count = min(step, rows - begin)
        first, skip = divmod(begin * columns, weight.block_size)
        end = skip + count * columns
        dequantize_blocks(weight, first, buffer[:end], dtype)
        yield slice(begin, begin + count), buffer[skip:end].view(count, columns)


def _column_slabs(
    weight: Arrays, shape: tuple[int, int], dtype: torch.dtype, held: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some columns of W at a time, as `_row_slabs` does; `has_column_slabs` must hold."""
    rows, columns = shape
    blocks = SLAB // held.itemsize // max(rows, 1) // weight.block_size
    step = max(1, blocks) * weight.block_size
    for begin in range(0, columns, step):
        found = slice(begin, min(begin + step, columns))
        width = found.stop - begin
        slab = _slab(rows * width, held).view(rows, width)
        dequantize_columns(weight, shape, found, slab, dtype)
        yield found, slab


def _slab(size: int, dtype: torch.dtype) -> Tensor:
    """Return flat memory that holds until the next call."""
    purpose = f"slabs {dtype}"
    arena = scratch(purpose, max(ARENA // dtype.itemsize, size), dtype, torch.device("cpu"))
    begin: int = getattr(_next, purpose, 0)
    if begin + size > arena.numel():
        begin = 0
    # A slab begins where a line of the cache does
    setattr(_next, purpose, begin + -(-size // _LINE) * _LINE)
    return arena[begin : begin + size]


_next = threading.local()
_LINE = 64  # elements, which is more


def add_product(y: Tensor, x: Tensor, weight: Arrays, beta: int = 1) -> Tensor:
    """Add x @ W.T to beta * y, in bf16 with one rounding of the sum, and return it."""
    for rows, w in _row_slabs(weight, (y.shape[1], x.shape[1]), x.dtype, x.dtype):
        y[:, rows].addmm_(x, w.T, beta=beta)
    return y


def add_product_backward(dx: Tensor, dy: Tensor, weight: Arrays, beta: int = 1) -> Tensor:
    """Add dy @ W to beta * dx, as `add_product` does; `has_column_slabs` must hold."""
    for columns, w in _column_slabs(weight, (dy.shape[1], dx.shape[1]), dy.dtype, dy.dtype):
        dx[:, columns].addmm_(dy, w, beta=beta)
    return dx


def product(x: Tensor, weight: Arrays, out_features: int) -> Tensor:
    """Return x @ W.T for x ``[M, K]``, fp32 (fp64 for fp64) and not yet rounded."""
    wide = widened(x)
    k = x.shape[1]
    y = new_empty((x.shape[0], out_features), wide.dtype)
    for rows, w in _row_slabs(weight, (out_features, k), x.dtype, torch.float32):
        torch.mm(wide, w.to(wide.dtype).T, out=y[:, rows])
    return y.zero_() if k == 0 else y


def product_backward(dy: Tensor, weight: Arrays, in_features: int) -> Tensor:
    """Return dy @ W for dy ``[M, N]``, fp32 (fp64 for fp64) and not yet rounded."""
    wide = widened(dy)
    shape = (dy.shape[1], in_features)
    dx = new_empty((dy.shape[0], in_features), wide.dtype)
    if has_column_slabs(*shape, weight.block_size):
        for columns, w in _column_slabs(weight, shape, dy.dtype, torch.float32):
            torch.mm(wide, w.to(wide.dtype), out=dx[:, columns])
        return dx
    dx.zero_()
    for rows, w in _row_slabs(weight, shape, dy.dtype, torch.float32):
        dx.addmm_(wide[:, rows], w.to(wide.dtype))
    return dx


def parts(m: int, dtype: torch.dtype, *widths: int) -> Iterator[slice]:
    """Yield all rows of a product, so many at a time that what is held of them in fp32 is bounded.

    Args:
        m: rows.
        dtype: of the inputs; nothing is held of what is not converted.
        *widths: columns of the input and of the result.
    """
    converted = accumulator(dtype) != dtype
    step = max(1, WIDE // max(1, *widths)) if converted else max(1, m)
    for begin in range(0, m, step):
        yield slice(begin, min(begin + step, m))


def widened(x: Tensor) -> Tensor:
    """Return x in the dtype that its sums are taken in."""
    acc = accumulator(x.dtype)
    return x if x.dtype == acc else new_empty(x.shape, acc).copy_(x)


def linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """Return x @ W.T + bias, times factor; arguments as in nf4/reference/linear.py."""
    if factor is not None:
        return linear(x, weight, bias).mul_(factor)
    rows = as_rows(x)
    m, (n, k) = len(rows), weight.shape
    how = choose("linear", m, weight, x.dtype).how
    if how == "few rows":
        return unflattened(few_rows.product(rows, repack(weight, "rows"), bias), x)
    arrays = as_arrays(weight)
    if how == "bf16":
        y = new_empty((m, n), x.dtype)
        if bias is not None:
            y.copy_(bias)
        add_product(y, rows, arrays, beta=int(bias is not None))
    elif accumulator(x.dtype) == x.dtype:
        y = product(rows, arrays, n)
        y = y if bias is None else y.add_(bias)
    else:
        y = new_empty((m, n), x.dtype)
        for part in parts(m, x.dtype, k, n):
            wide = product(rows[part], arrays, n)
            y[part] = wide if bias is None else wide.add_(bias)
    return unflattened(y, x)


def linear_backward(dy: Tensor, weight: Weight) -> Tensor:
    """Return dy @ W; arguments as in nf4/reference/linear.py."""
    rows, arrays = as_rows(dy), as_arrays(weight)
    m, (n, k) = len(rows), weight.shape
    if accumulator(dy.dtype) == dy.dtype:
        return product_backward(rows, arrays, k).view(*dy.shape[:-1], k)
    dx = new_empty((m, k), dy.dtype)
    if choose("linear_backward", m, weight, dy.dtype).how == "bf16":
        add_product_backward(dx, rows, arrays, beta=0)
    else:
        for part in parts(m, dy.dtype, n, k):
            dx[part] = product_backward(rows[part], arrays, k)
    return dx.view(*dy.shape[:-1], k)
