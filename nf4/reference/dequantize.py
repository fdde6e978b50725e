"""Dequantize NF4: out[i] = round_to_dtype(levels[code[i]] * absmax[i // block_size]).

One fp32 multiply, one rounding to nearest even. Both levels of a byte come from one 256-entry
table. Source: QLoRA, section 3 (https://arxiv.org/abs/2305.14314).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from nf4.codebook import nf4_byte_levels
from nf4.reference._blocks import as_blocks
from nf4.reference.dequantize_absmax import dequantize_absmax
from nf4.reference.repack import repack


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    layout: str = "rows",
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize to a dense tensor.

    Args:
        packed: uint8, ``ceil(n / 2)`` bytes for n elements.
        absmax: float32 ``[ceil(n / block_size)]``, or its uint8 codes if double-quantized.
        absmax2: float32 ``[ceil(blocks / 256)]``; None without double quantization.
        offset: float32 ``[]``; None without double quantization.
        shape: sizes of the result, n elements in all.
        block_size: elements that share one absmax.
        dtype: floating dtype of the result.
        layout: order of packed and absmax, "rows" or "fragments", see `repack`.
        out: where to write it, dtype ``shape``; new by default.

    Returns:
        dtype ``shape``.
    """
    if layout == "fragments":
        n, k = shape
        packed, absmax = repack(packed, absmax, n, k, "rows")
    if absmax2 is not None and offset is not None:
        absmax = dequantize_absmax(absmax, absmax2, offset)
    byte = as_blocks(packed, block_size // 2).int()
    levels = embedding(byte, nf4_byte_levels(packed.device)).view(-1, block_size)
    rounded = levels.mul_(absmax[:, None]).to(dtype)
    rounded = rounded.view(-1)[: math.prod(shape)].view(tuple(shape))
    return rounded if out is None else out.copy_(rounded)
