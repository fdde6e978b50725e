"""Quantize to NF4: the nearest of 16 levels, relative to the largest magnitude of each block.

    absmax[b] = max |x| over block b      code[i] = #{thresholds < x[i] * (1 / absmax)}

Blocks run over the flattened tensor. A tie takes the lower code. Two codes a byte, the even element
in the high nibble; an odd count is padded with the code of zero. Source: QLoRA, section 3
(https://arxiv.org/abs/2305.14314); byte order and thresholds are those of bitsandbytes.
"""

import torch
from torch import Tensor

from nf4.codebook import SMALLEST_ABSMAX, nf4_thresholds
from nf4.reference._blocks import as_blocks


def quantize(
    w: Tensor, block_size: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize w.

    Args:
        w: float32, float16 or bfloat16, any shape.
        block_size: elements that share one absmax.
        out: where to write the results; new by default.

    Returns:
        packed: uint8 ``[ceil(n / 2)]`` for n elements.
        absmax: float32 ``[ceil(n / block_size)]``; not finite where a block is not.
    """
    x = as_blocks(w.float(), block_size)
    absmax = x.abs().amax(dim=1)
    absmax = torch.where(absmax < SMALLEST_ABSMAX, 0.0, absmax)
    codes = codes_of(x, absmax[:, None])
    packed = pack(codes.view(-1)[: w.numel() + w.numel() % 2])
    return (packed, absmax) if out is None else (out[0].copy_(packed), out[1].copy_(absmax))


def codes_of(x: Tensor, scale: Tensor) -> Tensor:
    """Return the codes of the levels nearest to float32 values relative to their scales: uint8."""
    scaled = x * torch.where(scale == 0, 0.0, 1 / scale)
    codes = torch.zeros_like(scaled, dtype=torch.uint8)
    for threshold in nf4_thresholds():
        codes += (scaled > threshold).view(torch.uint8)
    return codes


def pack(codes: Tensor) -> Tensor:
    """Return an even number of codes ``[n]``, two a byte: uint8 ``[n / 2]``."""
    return codes[0::2] << 4 | codes[1::2]
