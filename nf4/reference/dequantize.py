"""Dequantize NF4: out[i] = round_to_dtype(levels[code[i]] * absmax[i // block_size]).

One fp32 multiply, one rounding to nearest even. Both levels of a byte come from one 256-entry
table. Source: QLoRA, section 3 (https://arxiv.org/abs/2305.14314).
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding

from nf4.codebook import nf4_byte_levels
from nf4.reference._blocks import as_blocks
from nf4.reference.dequantize_absmax import scales_of
from nf4.reference.repack import repack
from nf4.tensor import Weight


def dequantize(weight: Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Dequantize to a dense tensor.

    Args:
        weight: of any shape in rows, or a matrix in fragments.
        dtype: floating dtype of the result.
        out: where to write it, dtype ``weight.shape``; new by default.

    Returns:
        dtype ``weight.shape``.
    """
    shape, block_size = tuple(weight.shape), weight.block_size
    weight = repack(weight, "rows")
    byte = as_blocks(weight.packed, block_size // 2).int()
    levels = embedding(byte, nf4_byte_levels(weight.device)).view(-1, block_size)
    rounded = levels.mul_(scales_of(weight)[:, None]).to(dtype)
    rounded = rounded.view(-1)[: math.prod(shape)].view(shape)
    return rounded if out is None else out.copy_(rounded)
