"""Look rows of an NF4 matrix up: out[i] = dequantize(W)[rows[i]], making no other row dense.

Element j of row n is element n * K + j of the flattened matrix, with its code and its scale.
"""

import torch
from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE, absmax_map, nf4_levels


def embedding(
    rows: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    k: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return some rows of a matrix.

    Args:
        rows: int64 ``[M]``.
        packed: uint8, the bytes of the matrix ``[N, K]``.
        absmax: float32 ``[blocks]``, or its uint8 codes if double-quantized.
        absmax2: float32 ``[ceil(blocks / 256)]``; None without double quantization.
        offset: float32 ``[]``; None without double quantization.
        k: K.
        block_size: elements that share one absmax.
        dtype: floating dtype of the result.

    Returns:
        dtype ``[M, K]``.
    """
    element = (rows[:, None] * k + torch.arange(k, device=rows.device)).view(-1)
    byte = packed.view(-1).index_select(0, element >> 1)
    code = torch.where(element % 2 == 0, byte >> 4, byte & 15).int()
    scales = gather_scales(absmax, absmax2, offset, element // block_size)
    return (nf4_levels(packed.device)[code] * scales).to(dtype).view(-1, k)


def gather_scales(
    absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None, blocks: Tensor
) -> Tensor:
    """Return the float32 scales of some blocks, int64 ``[n]``."""
    absmax = absmax.index_select(0, blocks)
    if absmax2 is None or offset is None:
        return absmax
    return absmax_map(absmax.device)[absmax.int()] * absmax2[blocks // ABSMAX_BLOCK_SIZE] + offset
