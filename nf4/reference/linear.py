"""Multiply by a quantized weight: y = x @ W.T + bias.

W is dequantized to the dtype of x, products are summed in fp32 (fp64 for fp64) and y is rounded
once.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of products of `dtype` are taken in."""
    return torch.promote_types(dtype, torch.float32)


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ w.T + bias.

    Args:
        x: floating ``[..., K]``.
        w: dtype of x ``[N, K]``, dequantized.
        bias: floating ``[N]`` or None.

    Returns:
        dtype of x ``[..., N]``.
    """
    acc = accumulator(x.dtype)
    return dense_linear(x.to(acc), w.to(acc), None if bias is None else bias.to(acc)).to(x.dtype)


def linear_backward(dy: Tensor, w: Tensor) -> Tensor:
    """Return the gradient of x: dy @ w.

    Args:
        dy: floating ``[..., N]``.
        w: dtype of dy ``[N, K]``, dequantized.

    Returns:
        dtype of dy ``[..., K]``.
    """
    acc = accumulator(dy.dtype)
    return (dy.to(acc) @ w.to(acc)).to(dy.dtype)
