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

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from nf4.reference.dropout_mask import dropout_mask
from nf4.reference.linear import accumulator


def _drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x if seed is None else torch.where(dropout_mask(seed, x.shape, p), x, 0)


def lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y and t.

    Args:
        x: floating ``[M, K]``.
        w: dtype of x ``[N, K]``, dequantized.
        bias: floating ``[N]`` or None.
        lora_A: floating ``[r, K]``, rounded to the dtype of x.
        lora_B: floating ``[N, r]``, rounded to the dtype of x.
        scaling: s.
        dropout_p: probability of dropping an element of x before A.
        seed: int64 ``[]`` of the dropout mask; None for no dropout.

    Returns:
        y: dtype of x ``[M, N]``.
        t: dtype of x ``[M, r]``.
    """
    acc = accumulator(x.dtype)
    a, b = (m.to(x.dtype).to(acc) for m in (lora_A, lora_B))
    wide = x.to(acc)
    t = (_drop(wide, dropout_p, seed) @ a.T).div_(1 - dropout_p).to(x.dtype)
    y = dense_linear(wide, w.to(acc), None if bias is None else bias.to(acc))
    return y.addmm_(t.to(acc), b.T, alpha=scaling).to(x.dtype), t


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    w: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, bias, lora_A and lora_B, each None unless asked for.

    Args:
        dy: floating ``[M, N]``.
        x: dtype of dy ``[M, K]``; None unless lora_A needs its gradient.
        t: dtype of dy ``[M, r]`` from forward; None unless lora_B needs its gradient.
        w: dtype of dy ``[N, K]``, dequantized; None unless x needs its gradient.
        lora_A: floating ``[r, K]``.
        lora_B: floating ``[N, r]``.
        scaling: s.
        dropout_p: as in forward.
        seed: as in forward.
        need_bias: whether the gradient of bias is wanted.

    Returns:
        dx: dtype of dy ``[M, K]``.
        dbias: fp32 (fp64 for fp64) ``[N]``.
        dA: fp32 (fp64 for fp64) ``[r, K]``.
        dB: fp32 (fp64 for fp64) ``[N, r]``.
    """
    acc = accumulator(dy.dtype)
    wide = dy.to(acc)
    a, b = (m.to(dy.dtype).to(acc) for m in (lora_A, lora_B))
    dx = dA = None
    if w is not None or x is not None:
        u = (wide @ b).mul_(scaling).to(dy.dtype).to(acc)
    if w is not None:
        dx = wide @ w.to(acc)
        if seed is None:
            dx.addmm_(u, a)
        else:
            dx.add_(_drop(u @ a, dropout_p, seed), alpha=1 / (1 - dropout_p))
        dx = dx.to(dy.dtype)
    if x is not None:
        dA = (u.T @ _drop(x.to(acc), dropout_p, seed)).div_(1 - dropout_p)
    dB = (wide.T @ t.to(acc)).mul_(scaling) if t is not None else None
    dbias = wide.sum(dim=0) if need_bias else None
    return dx, dbias, dA, dB
