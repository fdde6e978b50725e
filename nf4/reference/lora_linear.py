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
from nf4.tools.rows import of_both_rows, of_rows


@of_rows
def lora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_t: bool,
    block_size: int,
    layout: str = "rows",
) -> tuple[Tensor, Tensor]:
    """Return y and t.

    Args:
        x: floating ``[..., K]``, M rows in all.
        packed: uint8, W ``[N, K]`` as in `dequantize`, with its scales.
        absmax: as in `dequantize`.
        absmax2: as in `dequantize`.
        offset: as in `dequantize`.
        bias: floating ``[N]`` or None.
        lora_A: floating ``[r, K]``, rounded to the dtype of x.
        lora_B: floating ``[N, r]``, rounded to the dtype of x.
        scaling: s.
        dropout_p: probability of dropping an element of x before A.
        seed: int64 ``[]`` of the dropout mask; None for no dropout.
        need_t: whether t is wanted; where it comes for nothing it is given anyway.
        block_size: elements that share one absmax.
        layout: as in `dequantize`.

    Returns:
        y: dtype of x ``[..., N]``.
        t: dtype of x ``[M, r]``, or empty if it is not wanted.
    """
    acc = accumulator(x.dtype)
    shape = (lora_B.shape[0], x.shape[1])
    w = dequantize(packed, absmax, absmax2, offset, shape, block_size, x.dtype, layout)
    y = x.to(acc) @ w.to(acc).T
    return add_lora(y, x, bias, lora_A, lora_B, scaling, dropout_p, seed)


def add_lora(
    y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y and t as `lora_linear` does, given x @ W.T in fp32 (fp64 for fp64), overwritten."""
    acc = accumulator(x.dtype)
    a, b = (m.to(x.dtype).to(acc) for m in (lora_A, lora_B))
    t = (drop(x.to(acc), dropout_p, seed) @ a.T).div_(1 - dropout_p).to(x.dtype)
    y.addmm_(t.to(acc), b.T, alpha=scaling)
    return (y if bias is None else y.add_(bias.to(acc))).to(x.dtype), t


@of_both_rows
def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    block_size: int,
    needs: Sequence[bool],
    layout: str = "rows",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, bias, lora_A and lora_B, each None unless asked for.

    Args:
        dy: floating ``[..., N]``, M rows in all.
        x: dtype of dy ``[..., K]``; None unless lora_A needs its gradient.
        t: dtype of dy ``[M, r]`` from forward; None unless lora_B needs its gradient.
        packed: as in forward, with its scales.
        absmax: as in forward.
        absmax2: as in forward.
        offset: as in forward.
        lora_A: floating ``[r, K]``.
        lora_B: floating ``[N, r]``.
        scaling: s.
        dropout_p: as in forward.
        seed: as in forward.
        block_size: as in forward.
        needs: which gradients are wanted, in the order of the result.
        layout: as in forward.

    Returns:
        dx: dtype of dy ``[..., K]``.
        dbias: fp32 (fp64 for fp64) ``[N]``.
        dA: fp32 (fp64 for fp64) ``[r, K]``.
        dB: fp32 (fp64 for fp64) ``[N, r]``.
    """
    dx = None
    if needs[0]:
        acc = accumulator(dy.dtype)
        shape = (lora_B.shape[0], lora_A.shape[1])
        w = dequantize(packed, absmax, absmax2, offset, shape, block_size, dy.dtype, layout)
        dx = dy.to(acc) @ w.to(acc)
    return add_lora_backward(dx, dy, x, t, lora_A, lora_B, scaling, dropout_p, seed, needs)


def add_lora_backward(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients as `lora_linear_backward` does, given dy @ W, which is overwritten."""
    wide = dy.to(accumulator(dy.dtype))
    a, b = (m.to(dy.dtype).to(wide.dtype) for m in (lora_A, lora_B))
    dbias = wide.sum(dim=0) if needs[1] else None
    dA = None
    if dx is not None or x is not None:
        u = (wide @ b).mul_(scaling).to(dy.dtype).to(wide.dtype)
    if dx is not None:
        if seed is None:
            dx.addmm_(u, a)
        else:
            dx.add_(drop(u @ a, dropout_p, seed), alpha=1 / (1 - dropout_p))
        dx = dx.to(dy.dtype)
    if x is not None:
        dA = (u.T @ drop(x.to(wide.dtype), dropout_p, seed)).div_(1 - dropout_p)
    dB = (wide.T @ t.to(wide.dtype)).mul_(scaling) if t is not None else None
    return dx, dbias, dA, dB
