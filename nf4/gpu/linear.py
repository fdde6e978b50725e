"""Multiply by a quantized weight on a GPU: y = x @ W.T + bias, dx = dy @ W."""

import torch
from torch import Tensor
from torch.nn.functional import linear as library_linear

from nf4.gpu.plan import choose
from nf4.kernels._launch import spoil
from nf4.kernels.dequantize import dequantize
from nf4.kernels.matmul import matmul
from nf4.kernels.matmul_row import matmul_row
from nf4.kernels.matmul_small import matmul_small
from nf4.tensor import Weight
from nf4.tools import scratch
from nf4.tools.rows import as_rows, unflattened
from nf4.tools.terms import Epilogue

KERNELS = {"matmul": matmul, "matmul_row": matmul_row, "matmul_small": matmul_small}


def dense_scratch(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return `shared_dense` for a library to multiply by: more than launches."""
    spoil()
    return shared_dense(weight, dtype)


def shared_dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return scratch memory for a matrix made dense, good until the next call that wants some."""
    n, k = weight.shape
    return scratch.matrix(f"dense weight, {dtype}", (n, k), dtype, weight.device)


def linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """Return x @ W.T + bias, times factor; arguments as in nf4/reference/linear.py."""
    rows, weight = as_rows(x).contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    factor = None if factor is None else factor.contiguous()
    kernel = choose("linear", rows.shape[0], weight, x.dtype).how
    if kernel in KERNELS:
        y: Tensor = KERNELS[kernel](rows, weight, Epilogue(bias, factor=factor))
    else:
        w = dequantize(weight, x.dtype, dense_scratch(weight, x.dtype))
        y = library_linear(rows, w, None if bias is None else bias.to(x.dtype))
        y = y if factor is None else y.mul_(factor)
    return unflattened(y, x)


def linear_backward(dy: Tensor, weight: Weight) -> Tensor:
    """Return dy @ W; arguments as in nf4/reference/linear.py."""
    return dy @ dequantize(weight, dy.dtype, dense_scratch(weight, dy.dtype))
