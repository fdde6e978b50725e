"""Look rows of an NF4 matrix up: out[i] = dequantize(W)[rows[i]], making no other row dense.

Element j of row n is element n * K + j of the flattened matrix, with its code and its scale.
"""

import torch
from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE, absmax_map, nf4_levels
from nf4.tensor import Weight


def embedding(rows: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return some rows of a matrix.

    Args:
        rows: int64 ``[M]``.
        weight: ``[N, K]`` in rows.
        dtype: floating dtype of the result.

    Returns:
        dtype ``[M, K]``.
    """
    k = weight.shape[1]
    element = (rows[:, None] * k + torch.arange(k, device=rows.device)).view(-1)
    byte = weight.packed.view(-1).index_select(0, element >> 1)
    code = torch.where(element % 2 == 0, byte >> 4, byte & 15).int()
    scales = gather_scales(weight, element // weight.block_size)
    return (nf4_levels(weight.device)[code] * scales).to(dtype).view(-1, k)


def gather_scales(weight: Weight, blocks: Tensor) -> Tensor:
    """Return the float32 scales of some blocks, int64 ``[n]``."""
    absmax = weight.absmax.index_select(0, blocks)
    if weight.absmax2 is None or weight.offset is None:
        return absmax
    absmax2 = weight.absmax2[blocks // ABSMAX_BLOCK_SIZE]
    return absmax_map(absmax.device)[absmax.int()] * absmax2 + weight.offset
