"""Operators that quantize scales: quantize_absmax; quantize_absmax_out writes to given tensors."""

from typing import Any

import torch
from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE
from nf4.ops.registry import define, nothing, run


def _fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (a.absmax.numel() + ABSMAX_BLOCK_SIZE - 1) // ABSMAX_BLOCK_SIZE
    codes = torch.empty_like(a.absmax, dtype=torch.uint8)
    return codes, a.absmax.new_empty(blocks), a.absmax.new_empty(())


def _quantize_absmax_out(a: Any) -> None:
    run("quantize_absmax", a.absmax, a.absmax, (a.codes, a.absmax2, a.offset))


define(
    "quantize_absmax",
    "(Tensor absmax) -> (Tensor, Tensor, Tensor)",
    _fake,
    pack=lambda a: (a.absmax,),
)
define(
    "quantize_absmax_out",
    "(Tensor absmax, Tensor(a!) codes, Tensor(b!) absmax2, Tensor(c!) offset) -> ()",
    nothing,
    compute=_quantize_absmax_out,
)
