"""Multiply by a quantized weight on a GPU: y = x @ W.T + bias, dx = dy @ W."""

import torch
from torch import Tensor
from torch.nn.functional import linear as library_linear

from nf4.gpu.plan import plan
from nf4.kernels._launch import spoil
from nf4.kernels.dequantize import dequantize
from nf4.kernels.matmul import matmul
from nf4.kernels.matmul_row import matmul_row
from nf4.kernels.matmul_small import matmul_small
from nf4.tools import scratch
from nf4.tools.rows import as_rows, unflattened

KERNELS = {"matmul": matmul, "matmul_row": matmul_row, "matmul_small": matmul_small}


def contiguous(
    packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the parts of a weight as kernels read them; what is contiguous is not copied."""
    absmax2 = None if absmax2 is None else absmax2.contiguous()
    return packed.contiguous(), absmax.contiguous(), absmax2, offset


def dense_scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return scratch memory for a dense weight, good until the next call that wants some."""
    spoil()  # a library multiplies by it
    return scratch.matrix(f"dense weight, {dtype}", shape, dtype, device)


def dense_weight(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, int],
    block_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantize a weight into scratch memory, good until the next call that wants some."""
    out = dense_scratch(shape, dtype, packed.device)
    dequantize(packed, absmax, absmax2, offset, shape, block_size, dtype, layout, out)
    return out


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
    """Return x @ W.T + bias, times factor; arguments as in nf4/reference/linear.py."""
    rows, n = as_rows(x).contiguous(), out_features
    weight = contiguous(packed, absmax, absmax2, offset)
    bias = None if bias is None else bias.contiguous()
    factor = None if factor is None else factor.contiguous()
    m, k = rows.shape
    kernel = plan(m, n, k, x.dtype, layout, block_size, absmax2 is not None, x.device).kernel
    if kernel in KERNELS:
        y: Tensor = KERNELS[kernel](rows, *weight, bias, None, None, 1.0, n, block_size, factor)
    else:
        w = dense_weight(*weight, (n, k), block_size, layout, x.dtype)
        y = library_linear(rows, w, None if bias is None else bias.to(x.dtype))
        y = y if factor is None else y.mul_(factor)
    return unflattened(y, x)


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
    shape = (dy.shape[-1], in_features)
    weight = contiguous(packed, absmax, absmax2, offset)
    w = dense_weight(*weight, shape, block_size, layout, dy.dtype)
    return dy @ w
