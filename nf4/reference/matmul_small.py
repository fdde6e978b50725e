"""Multiply few rows by a weight in fragments: y = f * (x @ W.T + scaling * t @ lora_B.T + bias).

Levels are rounded to the dtype of x before they are multiplied, and scales only meet the sums:

    y[m, n] = sum over blocks b of row n: absmax[b] * (sum over k in b: x[m, k] * level[n, k])

Sums are taken in fp32, y is rounded once.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

import torch
from torch import Tensor

from nf4.codebook import nf4_levels
from nf4.reference.dequantize_absmax import dequantize_absmax
from nf4.reference.repack import repack


def matmul_small(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    t: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    out_features: int,
    block_size: int,
    factor: Tensor | None = None,
) -> Tensor:
    """Return y; arguments and result as of nf4/reference/matmul.py."""
    weight = (packed, absmax, absmax2, offset)
    return matmul_by_levels(
        x.dtype, x, *weight, bias, t, lora_B, scaling, out_features, block_size, factor
    )


def matmul_by_levels(
    of: torch.dtype,
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    t: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    out_features: int,
    block_size: int,
    factor: Tensor | None = None,
) -> Tensor:
    """Return y by levels that are rounded to a dtype."""
    n, k = out_features, x.shape[1]
    packed, absmax = repack(packed, absmax, n, k, "rows")
    if absmax2 is not None and offset is not None:
        absmax = dequantize_absmax(absmax, absmax2, offset)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(n, -1, block_size).int()
    levels = nf4_levels(x.device).to(of).float()[codes]
    sums = torch.einsum("mbk,nbk->mnb", x.float().view(len(x), -1, block_size), levels)
    y = (sums * absmax.view(n, -1)).sum(dim=-1)
    if t is not None and lora_B is not None:
        y += scaling * (t.float() @ lora_B.to(x.dtype).float().T)
    if bias is not None:
        y += bias.float()
    if factor is not None:
        y *= factor.float()
    return y.to(x.dtype)
