"""The operator that looks rows of a quantized matrix up."""

from typing import Any

import torch
from torch import Tensor

from nf4.ops.registry import define, run
from nf4.ops.weight import WEIGHT, parts_of
from nf4.reference.embedding import embedding, gather_scales
from nf4.tensor import Weight


def _embedding(a: Any) -> Tensor:
    rows, k, block_size = a.rows, a.k, a.block_size
    weight = Weight(*parts_of(a), (2 * a.packed.numel() // max(k, 1), k), block_size)
    if k % block_size:
        return embedding(rows, weight, a.dtype)
    # A row is whole blocks: gather its bytes and scales, and dequantize them
    per_row = k // block_size
    blocks = rows[:, None] * per_row + torch.arange(per_row, device=rows.device)
    found = a.packed.view(-1, k // 2).index_select(0, rows)
    gathered = gather_scales(weight, blocks.view(-1))
    out: Tensor
    looked_up = Weight(found, gathered, None, None, (len(rows), k), block_size)
    out = run("dequantize", found, looked_up, a.dtype)
    return out


def _fake(a: Any) -> Tensor:
    out: Tensor = a.packed.new_empty((a.rows.shape[0], a.k), dtype=a.dtype)
    return out


define(
    "embedding",
    f"(Tensor rows, {WEIGHT}, SymInt k, int block_size, ScalarType dtype) -> Tensor",
    _fake,
    compute=_embedding,
)
