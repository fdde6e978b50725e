"""Multiply very few rows by fragments: y = f * (x @ W.T + scaling * t @ lora_B.T + bias).

As nf4/reference/matmul_small.py, with levels as they are, in fp32.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

import torch
from torch import Tensor

from nf4.reference.matmul_small import matmul_by_levels


def matmul_row(
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
        torch.float32, x, *weight, bias, t, lora_B, scaling, out_features, block_size, factor
    )
