"""Multiply by a quantized weight: y = factor * (x @ W.T + bias), and the gradient dx = dy @ W.

W is dequantized to the dtype of x, products are summed in fp32 (fp64 for fp64) and the result is
rounded once.
"""

import torch
from torch import Tensor

from nf4.reference.dequantize import dequantize
from nf4.tensor import Weight


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of products of `dtype` are taken in."""
    return torch.promote_types(dtype, torch.float32)


def linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """Return x @ W.T + bias, times factor.

    Args:
        x: floating ``[..., K]``.
        weight: W ``[N, K]``.
        bias: floating ``[N]`` or None.
        factor: floating ``[N]``, of each output, or None.

    Returns:
        dtype of x ``[..., N]``.
    """
    acc = accumulator(x.dtype)
    y = x.to(acc) @ dequantize(weight, x.dtype).to(acc).T
    y = y if bias is None else y + bias.to(acc)
    return (y if factor is None else y * factor.to(acc)).to(x.dtype)


def linear_backward(dy: Tensor, weight: Weight) -> Tensor:
    """Return the gradient of x: dy @ W.

    Args:
        dy: floating ``[..., N]``.
        weight: W ``[N, K]``.

    Returns:
        dtype of dy ``[..., K]``.
    """
    acc = accumulator(dy.dtype)
    return (dy.to(acc) @ dequantize(weight, dy.dtype).to(acc)).to(dy.dtype)
