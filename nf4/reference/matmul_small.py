"""Multiply few rows by a weight in fragments: y = f * (x @ W.T + scaling * t @ lora_B.T + bias).

Levels are rounded to the dtype of x before they are multiplied, and scales only meet the sums:

    y[m, n] = sum over blocks b of row n: absmax[b] * (sum over k in b: x[m, k] * level[n, k])

Sums are taken in fp32, y is rounded once.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

import torch
from torch import Tensor

from nf4.codebook import nf4_levels
from nf4.reference.dequantize_absmax import scales_of
from nf4.reference.matmul import finished
from nf4.reference.repack import repack
from nf4.tensor import Weight
from nf4.tools.terms import PLAIN_SUMS, Epilogue


def matmul_small(x: Tensor, weight: Weight, epilogue: Epilogue = PLAIN_SUMS) -> Tensor:
    """Return y; arguments and result as of nf4/reference/matmul.py."""
    return matmul_by_levels(x.dtype, x, weight, epilogue)


def matmul_by_levels(of: torch.dtype, x: Tensor, weight: Weight, epilogue: Epilogue) -> Tensor:
    """Return y by levels that are rounded to a dtype."""
    n, block_size = weight.shape[0], weight.block_size
    weight = repack(weight, "rows")
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=-1)
    levels = nf4_levels(x.device).to(of).float()[codes.view(n, -1, block_size).int()]
    sums = torch.einsum("mbk,nbk->mnb", x.float().view(len(x), -1, block_size), levels)
    y = (sums * scales_of(weight).view(n, -1)).sum(dim=-1)
    return finished(y, x.dtype, epilogue)
