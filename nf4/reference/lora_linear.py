"""Multiply by a quantized weight plus a low-rank update, forward and backward.

    t = drop(x) @ A.T / (1 - p)       y = x @ W.T + s * t @ B.T + bias
    u = s * dy @ B                    dx = dy @ W + drop(u @ A) / (1 - p)
    dB = s * dy.T @ t                 dA = u.T @ drop(x) / (1 - p)
    dbias = sum of dy over rows

drop sets elements to zero with probability p. Forward keeps t, so that backward computes nothing
twice; the dropout mask is made again from its seed. Sums are taken in fp32 (fp64 for fp64); t, u
and every result are rounded once.
Source: LoRA (https://arxiv.org/abs/2106.09685, section 4.1).
"""

from collections.abc import Sequence

from torch import Tensor

from nf4.reference.dequantize import dequantize
from nf4.reference.dropout_mask import drop
from nf4.reference.linear import accumulator
from nf4.tensor import Weight
from nf4.tools.rows import of_both_rows, of_rows
from nf4.tools.terms import LowRank

# Of x, bias, lora_A and lora_B
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@of_rows
def lora_linear(
    x: Tensor, weight: Weight, low_rank: LowRank, bias: Tensor | None, need_t: bool
) -> tuple[Tensor, Tensor]:
    """Return y and t.

    Args:
        x: floating ``[..., K]``, M rows in all.
        weight: W ``[N, K]``.
        low_rank: A, B, s and dropout.
        bias: floating ``[N]`` or None.
        need_t: whether t is wanted; where it comes for nothing it is given anyway.

    Returns:
        y: dtype of x ``[..., N]``.
        t: dtype of x ``[M, r]``, or empty if it is not wanted.
    """
    acc = accumulator(x.dtype)
    y = x.to(acc) @ dequantize(weight, x.dtype).to(acc).T
    return add_lora(y, x, low_rank, bias)


def add_lora(y: Tensor, x: Tensor, low_rank: LowRank, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return y and t as `lora_linear` does, given x @ W.T in fp32 (fp64 for fp64), overwritten."""
    lora_A, lora_B, scaling, dropout = low_rank
    acc = accumulator(x.dtype)
    a, b = (m.to(x.dtype).to(acc) for m in (lora_A, lora_B))
    t = (drop(x.to(acc), dropout) @ a.T).div_(1 - dropout.p).to(x.dtype)
    y.addmm_(t.to(acc), b.T, alpha=scaling)
    return (y if bias is None else y.add_(bias.to(acc))).to(x.dtype), t


@of_both_rows
def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    weight: Weight,
    low_rank: LowRank,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of x, bias, lora_A and lora_B, each None unless asked for.

    Args:
        dy: floating ``[..., N]``, M rows in all.
        x: dtype of dy ``[..., K]``; None unless lora_A needs its gradient.
        t: dtype of dy ``[M, r]`` from forward; None unless lora_B needs its gradient.
        weight: as in forward.
        low_rank: as in forward.
        needs: which gradients are wanted, in the order of the result.

    Returns:
        dx: dtype of dy ``[..., K]``.
        dbias: fp32 (fp64 for fp64) ``[N]``.
        dA: fp32 (fp64 for fp64) ``[r, K]``.
        dB: fp32 (fp64 for fp64) ``[N, r]``.
    """
    dx = None
    if needs[0]:
        acc = accumulator(dy.dtype)
        dx = dy.to(acc) @ dequantize(weight, dy.dtype).to(acc)
    return add_lora_backward(dx, dy, x, t, low_rank, needs)


def add_lora_backward(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    low_rank: LowRank,
    needs: Sequence[bool],
) -> Gradients:
    """Return gradients as `lora_linear_backward` does, given dy @ W, which is overwritten."""
    lora_A, lora_B, scaling, dropout = low_rank
    wide = dy.to(accumulator(dy.dtype))
    a, b = (m.to(dy.dtype).to(wide.dtype) for m in (lora_A, lora_B))
    dbias = wide.sum(dim=0) if needs[1] else None
    dA = None
    if dx is not None or x is not None:
        u = (wide @ b).mul_(scaling).to(dy.dtype).to(wide.dtype)
    if dx is not None:
        if dropout.seed is None:
            dx.addmm_(u, a)
        else:
            dx.add_(drop(u @ a, dropout), alpha=1 / (1 - dropout.p))
        dx = dx.to(dy.dtype)
    if x is not None:
        dA = (u.T @ drop(x.to(wide.dtype), dropout)).div_(1 - dropout.p)
    dB = (wide.T @ t.to(wide.dtype)).mul_(scaling) if t is not None else None
    return dx, dbias, dA, dB
