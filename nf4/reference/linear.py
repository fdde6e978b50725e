"""Multiply by a quantized weight: y = factor * (x @ W.T + bias), and the gradient dx = dy @ W.

W is dequantized to the dtype of x, products are summed in fp32 (fp64 for fp64) and the result is
rounded once.
"""

import torch
from torch import Tensor

from nf4.reference.dequantize import dequantize


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of products of `dtype` are taken in."""
    return torch.promote_types(dtype, torch.float32)


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
    factor: Tensor | None = None,
) -> Tensor:
    """Return x @ W.T + bias, times factor.

    Args:
        x: floating ``[..., K]``.
        packed: uint8, W ``[out_features, K]`` as in `dequantize`, with its scales.
        absmax: as in `dequantize`.
        absmax2: as in `dequantize`.
        offset: as in `dequantize`.
        bias: floating ``[out_features]`` or None.
        out_features: N.
        block_size: elements that share one absmax.
        layout: as in `dequantize`.
        factor: floating ``[out_features]``, of each output, or None.

    Returns:
        dtype of x ``[..., N]``.
    """
    acc = accumulator(x.dtype)
    shape = (out_features, x.shape[-1])
    w = dequantize(packed, absmax, absmax2, offset, shape, block_size, x.dtype, layout)
    y = x.to(acc) @ w.to(acc).T
    y = y if bias is None else y + bias.to(acc)
    return (y if factor is None else y * factor.to(acc)).to(x.dtype)


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
    """Return the gradient of x: dy @ W.

    Args:
        dy: floating ``[..., N]``.
        packed: uint8, W ``[N, in_features]`` as in `dequantize`, with its scales.
        absmax: as in `dequantize`.
        absmax2: as in `dequantize`.
        offset: as in `dequantize`.
        in_features: K.
        block_size: elements that share one absmax.
        layout: as in `dequantize`.

    Returns:
        dtype of dy ``[..., K]``.
    """
    acc = accumulator(dy.dtype)
    shape = (dy.shape[-1], in_features)
    w = dequantize(packed, absmax, absmax2, offset, shape, block_size, dy.dtype, layout)
    return (dy.to(acc) @ w.to(acc)).to(dy.dtype)
