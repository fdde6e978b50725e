"""Operators that dequantize: dequantize, and dequantize_out, which writes to a given tensor."""

from typing import Any

from torch import Tensor

from nf4.ops.registry import define, nothing, run
from nf4.ops.weight import LAYOUT, WEIGHT, weight_of


def _fake(a: Any) -> Tensor:
    out: Tensor = a.packed.new_empty(a.shape, dtype=a.dtype)
    return out


def _dequantize_out(a: Any) -> None:
    run("dequantize", a.packed, weight_of(a, a.out.shape), a.out.dtype, a.out)


define(
    "dequantize",
    f"({WEIGHT}, SymInt[] shape, int block_size, ScalarType dtype, {LAYOUT}) -> Tensor",
    _fake,
    pack=lambda a: (weight_of(a, a.shape), a.dtype),
)
define(
    "dequantize_out",
    f"({WEIGHT}, int block_size, Tensor(a!) out, {LAYOUT}) -> ()",
    nothing,
    compute=_dequantize_out,
)
