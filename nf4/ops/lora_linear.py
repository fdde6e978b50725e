"""The operators of a quantized weight with a low-rank update: its product, and all gradients.

What they compute is told in nf4/reference/lora_linear.py.
"""

import math
from typing import Any

from torch import Tensor

from nf4.ops.registry import (
    Gradient,
    Grads,
    call,
    define,
    no_double_backward,
    run,
)
from nf4.ops.weight import LAYOUT, LOW_RANK, WEIGHT, low_rank_of, parts_of, weight_of
from nf4.reference.linear import accumulator


def _pack(a: Any) -> tuple[Any, ...]:
    weight = weight_of(a, (a.lora_B.shape[0], a.x.shape[-1]))
    return a.x, weight, low_rank_of(a), a.bias, a.need_t


def _lora_linear(a: Any) -> tuple[Tensor, Tensor]:
    y, t = run("lora_linear", a.x, *_pack(a))
    return y, t if a.need_t else a.x.new_empty(0)


def _lora_linear_fake(a: Any) -> tuple[Tensor, Tensor]:
    x, rows = a.x, math.prod(a.x.shape[:-1])
    t = x.new_empty(rows, a.lora_A.shape[0]) if a.need_t else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], a.lora_B.shape[0]), t


def _keep(ctx: Any, needs: Any, a: Any, output: Any) -> None:
    _, t = output
    if t is not None:
        ctx.mark_non_differentiable(t)
    x, t = (a.x if needs.lora_A else None), (t if needs.lora_B else None)
    ctx.save_for_backward(x, t, *parts_of(a), a.lora_A, a.lora_B, a.seed)
    ctx.scaling, ctx.dropout_p = a.scaling, a.dropout_p
    ctx.block_size, ctx.layout = a.block_size, a.layout
    ctx.bias_dtype = None if a.bias is None else a.bias.dtype


def _gradients(ctx: Any, needs: Any, dy: Tensor, dt: None) -> Grads:
    *tensors, lora_A, lora_B, seed = ctx.saved_tensors
    wanted = [needs.x, needs.bias, needs.lora_A, needs.lora_B]
    low_rank = (lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed)
    form = (ctx.block_size, wanted, ctx.layout)
    found = call("lora_linear_backward", dy, *tensors, *low_rank, *form)
    names = ("x", "bias", "lora_A", "lora_B")
    dtypes = (dy.dtype, ctx.bias_dtype, lora_A.dtype, lora_B.dtype)
    return {
        name: grad if grad.dtype == dtype else grad.to(dtype)
        for name, grad, dtype, need in zip(names, found, dtypes, wanted, strict=True)
        if need
    }


def _pack_backward(a: Any) -> tuple[Any, ...]:
    weight = weight_of(a, (a.dy.shape[-1], a.lora_A.shape[1]))
    return a.dy, a.x, a.t, weight, low_rank_of(a), a.needs


def _lora_linear_backward(a: Any) -> tuple[Tensor, ...]:
    grads = run("lora_linear_backward", a.dy, *_pack_backward(a))
    return tuple(a.dy.new_empty(0) if g is None else g for g in grads)


def _lora_linear_backward_fake(a: Any) -> tuple[Tensor, ...]:
    dy, acc = a.dy, accumulator(a.dy.dtype)
    likes = (
        ((*dy.shape[:-1], a.lora_A.shape[1]), dy.dtype),
        ((dy.shape[-1],), acc),
        (a.lora_A.shape, acc),
        (a.lora_B.shape, acc),
    )
    return tuple(
        dy.new_empty(shape, dtype=dtype) if need else dy.new_empty(0)
        for (shape, dtype), need in zip(likes, a.needs, strict=True)
    )


define(
    "lora_linear_backward",
    f"(Tensor dy, Tensor? x, Tensor? t, {WEIGHT}, {LOW_RANK}, int block_size, bool[] needs, "
    f"{LAYOUT}) -> (Tensor, Tensor, Tensor, Tensor)",
    _lora_linear_backward_fake,
    pack=_pack_backward,
    compute=_lora_linear_backward,
    gradient=Gradient(no_double_backward),
)
define(
    "lora_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, {LOW_RANK}, bool need_t, int block_size, {LAYOUT})"
    " -> (Tensor, Tensor)",
    _lora_linear_fake,
    pack=_pack,
    compute=_lora_linear,
    gradient=Gradient(_gradients, _keep),
)
