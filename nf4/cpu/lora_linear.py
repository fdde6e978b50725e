"""Multiply by a quantized weight plus a low-rank update, slab by slab as in nf4/cpu/linear.py.

Where the CPU multiplies in bf16 the update is rounded to bf16 before the product is added to it, as
t and u are; the sum is rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nf4.cpu import few_rows
from nf4.cpu._memory import new_empty
from nf4.cpu.across import across, fits
from nf4.cpu.dequantize import Arrays, as_arrays
from nf4.cpu.dropout_mask import drop, dropout_mask
from nf4.cpu.linear import (
    add_product,
    add_product_backward,
    parts,
    product,
    product_backward,
    widened,
)
from nf4.cpu.plan import choose
from nf4.reference.linear import accumulator
from nf4.reference.lora_linear import Gradients, add_lora
from nf4.reference.repack import repack
from nf4.tensor import Weight
from nf4.tools.rows import of_both_rows, of_rows
from nf4.tools.terms import Dropout, LowRank


def _scaled(a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Return scale * a @ b + bias in bf16, rounded once."""
    out = new_empty((a.shape[0], b.shape[1]), a.dtype)
    if bias is not None:
        out.copy_(bias)
    return out.addmm_(a, b, beta=int(bias is not None), alpha=scale)


@of_rows
def lora_linear(
    x: Tensor, weight: Weight, low_rank: LowRank, bias: Tensor | None, need_t: bool
) -> tuple[Tensor, Tensor]:
    """Return y and t; arguments as in nf4/reference/lora_linear.py."""
    m, (n, k) = len(x), weight.shape
    lora_A, lora_B, scaling, dropout = low_rank
    dropped = drop(x, dropout)
    low_rank = LowRank(lora_A, lora_B, scaling, Dropout(dropout.p))  # what is dropped is dropped
    how = choose("lora_linear", m, weight, x.dtype, low_rank).how
    if how == "few rows":
        wide = few_rows.product(x, repack(weight, "rows"), bias, rounded=False)
        return add_lora(wide, dropped, low_rank, None)
    arrays = as_arrays(weight)
    if how == "bf16":
        a, b = (matrix.to(x.dtype) for matrix in (lora_A, lora_B))
        t = _scaled(dropped, a.T, 1 / (1 - dropout.p))
        return add_product(_scaled(t, b.T, scaling, bias), x, arrays), t
    y, t = new_empty((m, n), x.dtype), x.new_empty(m, len(lora_A))
    for part in parts(m, x.dtype, k, n):
        wide = product(x[part], arrays, n)
        y[part], t[part] = add_lora(wide, dropped[part], low_rank, bias)
    return y, t


@of_both_rows
def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    weight: Weight,
    low_rank: LowRank,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of x, bias, lora_A and lora_B; as in nf4/reference/lora_linear.py."""
    m, n = dy.shape
    lora_A, lora_B, scaling, dropout = low_rank
    arrays = as_arrays(weight) if needs[0] else None
    a, b = (matrix.to(dy.dtype) for matrix in (lora_A, lora_B))
    u, dx = None, None
    if choose("lora_linear_backward", m, weight, dy.dtype, low_rank).how == "bf16":
        if needs[0] or x is not None:
            u = _scaled(dy, b, scaling)
        if arrays is not None and u is not None:
            dx = drop(_scaled(u, a, 1 / (1 - dropout.p)), dropout)
            add_product_backward(dx, dy, arrays)
    elif needs[0] or x is not None:
        u = dy.new_empty(m, len(a))
        for part in parts(m, dy.dtype, n):
            u[part] = (widened(dy[part]) @ widened(b)).mul_(scaling)
        if arrays is not None:
            dx = _input_gradient(dy, u, arrays, a, dropout)
    dbias = dy.sum(dim=0, dtype=accumulator(dy.dtype)) if needs[1] else None
    dA = dB = None
    if x is not None and u is not None:
        dA = _across(u, drop(x, dropout)).div_(1 - dropout.p)
    if t is not None:
        dB = _across(t, dy).mul_(scaling).T.contiguous()  # wide rows: the library's better side
    return dx, dbias, dA, dB


def _input_gradient(dy: Tensor, u: Tensor, weight: Arrays, a: Tensor, dropout: Dropout) -> Tensor:
    """Return dy @ W + drop(u @ A) / (1 - p), summed in fp32 (fp64 for fp64) and rounded once."""
    dx = new_empty((dy.shape[0], a.shape[1]), dy.dtype)
    mask = None if dropout.seed is None else dropout_mask(dropout.seed, dx.shape, dropout.p)
    for part in parts(dy.shape[0], dy.dtype, *dy.shape[1:], *dx.shape[1:]):
        wide = product_backward(dy[part], weight, a.shape[1])
        if mask is None:
            dx[part] = wide.addmm_(widened(u[part]), widened(a))
        else:
            update = torch.where(mask[part], widened(u[part]) @ widened(a), 0)
            dx[part] = wide.add_(update, alpha=1 / (1 - dropout.p))
    return dx


def _across(a: Tensor, b: Tensor) -> Tensor:
    """Return a.T @ b in fp32 (fp64 for fp64)."""
    if fits(a, b):
        return across(a, b)
    total = a.new_zeros((a.shape[1], b.shape[1]), dtype=accumulator(a.dtype))
    for part in parts(a.shape[0], a.dtype, a.shape[1], b.shape[1]):
        total.addmm_(widened(a[part]).T, widened(b[part]))
    return total
