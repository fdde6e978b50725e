"""Dequantize a weight in fragments and add a low-rank update: out = round(W + scaling * B @ A).

Products and sums in fp32, one rounding.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

import torch
from torch import Tensor

from nf4.reference.dequantize import dequantize
from nf4.tensor import Weight
from nf4.tools.terms import LowRank


def dequantize_merge(
    weight: Weight, low_rank: LowRank, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return W + scaling * lora_B @ lora_A.

    Args:
        weight: ``[N, K]`` in fragments, see `repack`.
        low_rank: without dropout; its matrices are rounded to dtype.
        dtype: float16 or bfloat16, of the result.
        out: where to write it, contiguous; new by default.

    Returns:
        dtype ``[N, K]``.
    """
    w = dequantize(weight, torch.float32)
    a, b = (m.to(dtype).float() for m in (low_rank.lora_A, low_rank.lora_B))
    merged = (w + low_rank.scaling * (b @ a)).to(dtype)
    return merged if out is None else out.copy_(merged)
