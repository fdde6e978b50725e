"""The operator (x * input_factor) @ W.T + bias, times output_factor, of a quantized weight.

Source: (IA)³ (https://arxiv.org/abs/2205.05638, section 3.3).
"""

from typing import Any

import torch
from torch import Tensor

from nf4.ops.registry import (
    Gradient,
    Grads,
    call,
    define,
    no_double_backward,
    run,
)
from nf4.ops.weight import LAYOUT, WEIGHT, parts_of, weight_of
from nf4.reference.linear import accumulator


def times(x: Tensor, factor: Tensor) -> Tensor:
    """Return x * factor, rounded once to the dtype of x."""
    return (x * factor).to(x.dtype)


def _scaled_linear(a: Any) -> tuple[Tensor, Tensor]:
    x = a.x if a.input_factor is None else times(a.x, a.input_factor)
    weight = weight_of(a, (a.out_features, x.shape[-1]))
    if not a.need_y:
        y = run("linear", x, x, weight, a.bias, a.output_factor)
        return y, x.new_empty(0)
    y = run("linear", x, x, weight, a.bias)  # which output_factor's gradient needs
    return (y if a.output_factor is None else times(y, a.output_factor)), y


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    y = a.x.new_empty(a.x.shape[0], a.out_features)
    return y, torch.empty_like(y) if a.need_y else a.x.new_empty(0)


def _keep(ctx: Any, needs: Any, a: Any, output: Any) -> None:
    _, y = output
    ctx.mark_non_differentiable(y)
    x_kept, y_kept = (a.x if needs.input_factor else None), (y if needs.output_factor else None)
    ctx.save_for_backward(x_kept, y_kept, a.input_factor, a.output_factor, *parts_of(a))
    ctx.form = (a.x.shape[-1], a.block_size, a.layout)
    ctx.bias_dtype = None if a.bias is None else a.bias.dtype


def _gradients(ctx: Any, needs: Any, dy: Tensor, _: None) -> Grads:
    if torch.is_grad_enabled():  # its formula leaves out what depends on x through y
        no_double_backward(ctx, needs)
    x, y, input_factor, output_factor, *weight = ctx.saved_tensors
    grads: Grads = {}
    if needs.output_factor:
        grads["output_factor"] = _factor_grad(dy, y, output_factor.dtype)
    if output_factor is not None:
        dy = times(dy, output_factor)
    if needs.bias:
        grads["bias"] = dy.sum(dim=0, dtype=accumulator(dy.dtype)).to(ctx.bias_dtype)
    if needs.x or needs.input_factor:
        dx: Tensor = call("linear_backward", dy, *weight, *ctx.form)
        if needs.input_factor:
            grads["input_factor"] = _factor_grad(dx, x, input_factor.dtype)
        if needs.x:
            grads["x"] = dx if input_factor is None else times(dx, input_factor)
    return grads


def _factor_grad(dy: Tensor, y: Tensor, like: torch.dtype) -> Tensor:
    """Return the gradient of what y ``[M, N]`` was multiplied by."""
    acc = accumulator(dy.dtype)
    return (dy.to(acc) * y).sum(dim=0).to(like)


define(
    "scaled_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, Tensor? input_factor, Tensor? output_factor, bool need_y,"
    f" SymInt out_features, int block_size, {LAYOUT}) -> (Tensor, Tensor)",
    _fake,
    compute=_scaled_linear,
    gradient=Gradient(_gradients, _keep),
)
