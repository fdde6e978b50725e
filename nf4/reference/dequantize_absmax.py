"""Decode double-quantized scales: fp32(map[code] * absmax2), then + offset, two roundings.

Source: QLoRA, section 3 (https://arxiv.org/abs/2305.14314).
"""

from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE, absmax_map
from nf4.reference._blocks import as_blocks
from nf4.tensor import Weight


def dequantize_absmax(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Return the scales that `quantize_absmax` encoded.

    Args:
        codes: uint8 ``[blocks]``.
        absmax2: float32 ``[ceil(blocks / 256)]``.
        offset: float32 ``[]``.

    Returns:
        float32 ``[blocks]``.
    """
    d = as_blocks(absmax_map(codes.device)[codes.int()], ABSMAX_BLOCK_SIZE)
    return (d * absmax2[:, None]).view(-1)[: codes.numel()] + offset


def scales_of(weight: Weight) -> Tensor:
    """Return the scales of a weight's blocks, float32, in the order of its layout."""
    if weight.absmax2 is None or weight.offset is None:
        return weight.absmax
    return dequantize_absmax(weight.absmax, weight.absmax2, weight.offset)
