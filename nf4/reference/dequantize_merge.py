"""Dequantize a weight in fragments and add a low-rank update: out = round(W + scaling * B @ A).

Products and sums in fp32, one rounding.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

import torch
from torch import Tensor

from nf4.reference.dequantize import dequantize


def dequantize_merge(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    block_size: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return W + scaling * lora_B @ lora_A.

    Args:
        packed: uint8 ``[N, K / 2]`` in fragments, see `repack`.
        absmax: float32 ``[N * K / block_size]``, or its uint8 codes, in fragments.
        absmax2: float32 ``[ceil(blocks / 256)]``; None without double quantization.
        offset: float32 ``[]``; None without double quantization.
        lora_A: floating ``[r, K]``, rounded to dtype.
        lora_B: floating ``[N, r]``, rounded to dtype.
        scaling: factor of the update.
        block_size: elements that share one absmax.
        dtype: float16 or bfloat16, of the result.
        out: where to write it, contiguous; new by default.

    Returns:
        dtype ``[N, K]``.
    """
    shape = (lora_B.shape[0], lora_A.shape[1])
    weight = (packed, absmax, absmax2, offset)
    w = dequantize(*weight, shape, block_size, torch.float32, "fragments")
    a, b = (m.to(dtype).float() for m in (lora_A, lora_B))
    merged = (w + scaling * (b @ a)).to(dtype)
    return merged if out is None else out.copy_(merged)
