"""The operators x @ W.T + bias and dy @ W, of a quantized weight."""

from typing import Any

from torch import Tensor

from nf4.ops.registry import (
    Gradient,
    Grads,
    call,
    define,
    no_double_backward,
)
from nf4.ops.weight import LAYOUT, WEIGHT, parts_of, weight_of
from nf4.reference.linear import accumulator
from nf4.tools.rows import as_rows


def _linear_fake(a: Any) -> Tensor:
    out: Tensor = a.x.new_empty((*a.x.shape[:-1], a.out_features))
    return out


def _keep(ctx: Any, needs: Any, a: Any, output: Tensor) -> None:
    ctx.save_for_backward(*parts_of(a))
    ctx.form = (a.x.shape[-1], a.block_size, a.layout)
    ctx.bias_dtype = None if a.bias is None else a.bias.dtype


def _gradients(ctx: Any, needs: Any, dy: Tensor) -> Grads:
    grads: Grads = {}
    if needs.x:
        grads["x"] = call("linear_backward", dy, *ctx.saved_tensors, *ctx.form)
    if needs.bias:
        grads["bias"] = as_rows(dy).sum(dim=0, dtype=accumulator(dy.dtype)).to(ctx.bias_dtype)
    return grads


def _linear_backward_fake(a: Any) -> Tensor:
    out: Tensor = a.dy.new_empty((*a.dy.shape[:-1], a.in_features))
    return out


define(
    "linear_backward",
    f"(Tensor dy, {WEIGHT}, SymInt in_features, int block_size, {LAYOUT}) -> Tensor",
    _linear_backward_fake,
    pack=lambda a: (a.dy, weight_of(a, (a.dy.shape[-1], a.in_features))),
    gradient=Gradient(no_double_backward),
    rows=True,
)
define(
    "linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, SymInt out_features, int block_size, {LAYOUT}) -> Tensor",
    _linear_fake,
    pack=lambda a: (a.x, weight_of(a, (a.out_features, a.x.shape[-1])), a.bias),
    gradient=Gradient(_gradients, _keep),
    rows=True,
)
