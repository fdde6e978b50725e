"""Multiply by a weight in fragments: y = f * (x @ W.T + scaling * t @ lora_B.T + bias).

W is dequantized to the dtype of x, as nf4/reference/dequantize.py does. Sums are taken in fp32, y
is rounded once.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

import torch
from torch import Tensor

from nf4.reference.dequantize import dequantize
from nf4.tensor import Weight
from nf4.tools.terms import PLAIN_SUMS, Epilogue


def matmul(x: Tensor, weight: Weight, epilogue: Epilogue = PLAIN_SUMS) -> Tensor:
    """Return y.

    Args:
        x: float16 or bfloat16 ``[M, K]``.
        weight: W ``[N, K]`` in fragments, see `repack`.
        epilogue: the low-rank term, bias and factor.

    Returns:
        dtype of x ``[M, N]``.
    """
    return finished(x.float() @ dequantize(weight, x.dtype).float().T, x.dtype, epilogue)


def finished(y: Tensor, dtype: torch.dtype, epilogue: Epilogue) -> Tensor:
    """Return what becomes of sums ``[M, N]`` in fp32, which are overwritten."""
    bias, t, lora_B, scaling, factor = epilogue
    if t is not None and lora_B is not None:
        y += scaling * (t.float() @ lora_B.to(dtype).float().T)
    if bias is not None:
        y += bias.float()
    if factor is not None:
        y *= factor.float()
    return y.to(dtype)
