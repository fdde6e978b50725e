"""The operator that puts a quantized matrix into the other layout."""

from typing import Any

import torch
from torch import Tensor

from nf4.ops.registry import define, run
from nf4.tensor import Weight

_OTHER = {"fragments": "rows", "rows": "fragments"}


def _repack(a: Any) -> tuple[Tensor, Tensor]:
    shape, block_size = (a.rows, a.columns), a.rows * a.columns // max(a.absmax.numel(), 1)
    weight = Weight(a.packed, a.absmax, None, None, shape, block_size, _OTHER[a.layout])
    packed, absmax, *_ = run("repack", a.packed, weight, a.layout)
    return packed, absmax


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a.packed), torch.empty_like(a.absmax)


define(
    "repack",
    "(Tensor packed, Tensor absmax, SymInt rows, SymInt columns, str layout) -> (Tensor, Tensor)",
    _fake,
    compute=_repack,
)
