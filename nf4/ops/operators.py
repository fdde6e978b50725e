"""The operators of ``torch.ops.nf4``: what they compute, fake tensors, autograd.

Arguments are checked in `nf4.functional`, unless that needs the data.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE
from nf4.ops.registry import call, define, run, run_without_autocast
from nf4.reference.embedding import embedding, gather_scales
from nf4.reference.linear import accumulator
from nf4.tools.rows import as_rows

WEIGHT = "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset"
LAYOUT = "str layout='rows'"
_LORA = "Tensor lora_A, Tensor lora_B, float scaling, float dropout_p, Tensor? seed"


def _nothing(*args: Any) -> None:
    """Fake what writes to its arguments and returns nothing."""


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "nf4: the gradient of a gradient is not implemented; "
        "call backward without create_graph=True"
    )


# --- quantize


_SLAB = 2**22  # elements of a strided tensor that are made contiguous at a time: whole blocks


def _quantize(w: Tensor, block_size: int, check: bool) -> tuple[Tensor, Tensor]:
    return _checked(w, check, *_in_slabs("quantize", w, block_size))


def _quantize_mse(
    w: Tensor, block_size: int, signed: bool, weights: Tensor | None, check: bool
) -> tuple[Tensor, Tensor]:
    return _checked(w, check, *_in_slabs("quantize_mse", w, block_size, signed, weights))


def _in_slabs(
    op: str,
    w: Tensor,
    block_size: int,
    *options: Any,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize w; a strided one a slab at a time, so that no whole copy of it is held."""
    parts: tuple[Tensor, Tensor]
    if w.numel() <= _SLAB or w.is_contiguous():
        parts = run(op, w, w, block_size, *options, out)
        return parts
    packed, absmax = _quantize_fake(w, block_size) if out is None else out
    n, k = w.numel(), w.shape[-1]
    for start in range(0, n, _SLAB):
        stop = min(start + _SLAB, n)
        slab, own = _flat(w, start, stop), options
        if options and options[1] is not None:  # weights of columns
            own = (options[0], options[1][torch.arange(start, stop, device=w.device) % k])
        codes = packed[start // 2 : -(-stop // 2)]
        scales = absmax[start // block_size : -(-stop // block_size)]
        run(op, slab, slab, block_size, *own, (codes, scales))
    return packed, absmax


def _flat(w: Tensor, start: int, stop: int) -> Tensor:
    """Return ``w.reshape(-1)[start:stop]`` without a copy of what lies outside."""
    if w.ndim == 1:
        return w[start:stop]
    row = w.numel() // len(w)
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _flat(w[first], start - first * row, stop - first * row)
    head = _flat(w[first], start - first * row, row)
    tail = _flat(w[last], 0, stop - last * row)
    return torch.cat([head, w[first + 1 : last].reshape(-1), tail])


def _checked(w: Tensor, check: bool, packed: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    if check and not torch.isfinite(absmax).all():
        position = (~torch.isfinite(w.reshape(-1))).nonzero()[0, 0].cpu()
        index = tuple(int(i) for i in torch.unravel_index(position, w.shape))
        raise ValueError(f"w: expected finite values, got {w[index].item()} at index {index}")
    return packed, absmax


def _quantize_fake(w: Tensor, block_size: int, *flags: bool) -> tuple[Tensor, Tensor]:
    n = w.numel()
    return (
        w.new_empty((n + 1) // 2, dtype=torch.uint8),
        w.new_empty((n + block_size - 1) // block_size, dtype=torch.float32),
    )


def _quantize_out(w: Tensor, block_size: int, check: bool, packed: Tensor, absmax: Tensor) -> None:
    out = (packed.view(-1), absmax)
    if check:  # nothing is written before the check
        for target, value in zip(out, _quantize(w, block_size, check), strict=True):
            target.copy_(value)
    else:
        _in_slabs("quantize", w, block_size, out=out)


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts: tuple[Tensor, Tensor, Tensor]
    parts = run("quantize_absmax", absmax, absmax)
    return parts


def _quantize_absmax_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (absmax.numel() + ABSMAX_BLOCK_SIZE - 1) // ABSMAX_BLOCK_SIZE
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    return codes, absmax.new_empty(blocks), absmax.new_empty(())


def _quantize_absmax_out(absmax: Tensor, codes: Tensor, absmax2: Tensor, offset: Tensor) -> None:
    run("quantize_absmax", absmax, absmax, (codes, absmax2, offset))


# --- dequantize


def _dequantize(packed: Tensor, *args: Any) -> Tensor:
    out: Tensor = run("dequantize", packed, packed, *args)
    return out


def _dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    layout: str = "rows",
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _dequantize_out(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    out: Tensor,
    layout: str = "rows",
) -> None:
    weight = (packed, absmax, absmax2, offset)
    _dequantize(*weight, out.shape, block_size, out.dtype, layout, out)


# --- embedding


def _embedding(
    rows: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    k: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    scales = (absmax, absmax2, offset)
    if k % block_size:
        return embedding(rows, packed, *scales, k, block_size, dtype)
    # A row is whole blocks: gather its bytes and scales, and dequantize them
    per_row = k // block_size
    blocks = rows[:, None] * per_row + torch.arange(per_row, device=rows.device)
    found = packed.view(-1, k // 2).index_select(0, rows)
    gathered = gather_scales(*scales, blocks.view(-1))
    return _dequantize(found, gathered, None, None, [len(rows), k], block_size, dtype)


def _embedding_fake(rows: Tensor, packed: Tensor, *args: Any) -> Tensor:
    *_, k, _, dtype = args
    return packed.new_empty((rows.shape[0], k), dtype=dtype)


# --- repack


def _repack(packed: Tensor, absmax: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    packed, absmax = run("repack", packed, packed, absmax, *args)
    return packed, absmax


def _repack_fake(packed: Tensor, absmax: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(packed), torch.empty_like(absmax)


# --- linear


def _linear(x: Tensor, *args: Any) -> Tensor:
    out: Tensor = run_without_autocast("linear", x, *args)
    return out


def _linear_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], args[5]))


def _linear_backward(dy: Tensor, *args: Any) -> Tensor:
    out: Tensor = run_without_autocast("linear_backward", dy, *args)
    return out


def _linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, absmax, absmax2, offset, bias, _, *form = inputs
    ctx.save_for_backward(packed, absmax, absmax2, offset)
    ctx.in_features, ctx.form = x.shape[-1], form
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = call("linear_backward", dy, *ctx.saved_tensors, ctx.in_features, *ctx.form)
    if ctx.needs_input_grad[5]:
        dbias = as_rows(dy).sum(dim=0, dtype=accumulator(dy.dtype)).to(ctx.bias_dtype)
    return dx, None, None, None, None, dbias, None, None, None


# --- scaled_linear


def _scaled_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    input_factor: Tensor | None,
    output_factor: Tensor | None,
    need_y: bool,
    *form: Any,
) -> tuple[Tensor, Tensor]:
    if input_factor is not None:
        x = times(x, input_factor)
    terms = (x, packed, absmax, absmax2, offset, bias, *form)
    if not need_y:
        return _linear(*terms, output_factor), x.new_empty(0)
    y = _linear(*terms)  # which output_factor's gradient needs
    return (y if output_factor is None else times(y, output_factor)), y


def _scaled_linear_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    need_y, out_features = args[7], args[8]
    y = x.new_empty(x.shape[0], out_features)
    return y, torch.empty_like(y) if need_y else x.new_empty(0)


def times(x: Tensor, factor: Tensor) -> Tensor:
    """Return x * factor, rounded once to the dtype of x."""
    return (x * factor).to(x.dtype)


def _factor_grad(dy: Tensor, y: Tensor, like: torch.dtype) -> Tensor:
    """Return the gradient of what y ``[M, N]`` was multiplied by."""
    acc = accumulator(dy.dtype)
    return (dy.to(acc) * y).sum(dim=0).to(like)


def _scaled_linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, packed, absmax, absmax2, offset, bias, input_factor, output_factor, _, *form = inputs
    _, y = output
    ctx.mark_non_differentiable(y)
    need = ctx.needs_input_grad
    x_kept, y_kept = (x if need[6] else None), (y if need[7] else None)
    weight = (packed, absmax, absmax2, offset)
    ctx.save_for_backward(x_kept, y_kept, input_factor, output_factor, *weight)
    ctx.in_features, ctx.form = x.shape[-1], form
    ctx.bias_dtype = None if bias is None else bias.dtype


def _scaled_linear_autograd(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # its formula leaves out what depends on x through y
        _no_double_backward(ctx)
    x, y, input_factor, output_factor, *weight = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx: Any = None
    dbias = d_input = d_output = None
    if need[7]:
        d_output = _factor_grad(dy, y, output_factor.dtype)
    if output_factor is not None:
        dy = times(dy, output_factor)
    if need[5]:
        dbias = dy.sum(dim=0, dtype=accumulator(dy.dtype)).to(ctx.bias_dtype)
    if need[0] or need[6]:
        _, block_size, layout = ctx.form
        dx = call("linear_backward", dy, *weight, ctx.in_features, block_size, layout)
    if need[6]:
        d_input = _factor_grad(dx, x, input_factor.dtype)
    if input_factor is not None and need[0]:
        dx = times(dx, input_factor)
    dx = dx if need[0] else None
    return dx, None, None, None, None, dbias, d_input, d_output, None, None, None, None


# --- lora_linear


def _lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    y, t = run_without_autocast("lora_linear", x, *args)
    need_t = args[10]
    return y, t if need_t else x.new_empty(0)


def _lora_linear_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lora_A, lora_B, need_t = args[5], args[6], args[10]
    rows = math.prod(x.shape[:-1])
    t = x.new_empty(rows, lora_A.shape[0]) if need_t else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], lora_B.shape[0]), t


def _lora_linear_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    grads = _lora_linear_gradients(dy, *args)
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


def _lora_linear_gradients(dy: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = run_without_autocast("lora_linear_backward", dy, *args)
    return grads


def _lora_linear_backward_fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    lora_A, lora_B, needs = args[6], args[7], args[12]
    acc = accumulator(dy.dtype)
    likes = (
        ((*dy.shape[:-1], lora_A.shape[1]), dy.dtype),
        ((dy.shape[-1],), acc),
        (lora_A.shape, acc),
        (lora_B.shape, acc),
    )
    return tuple(
        dy.new_empty(shape, dtype=dtype) if need else dy.new_empty(0)
        for (shape, dtype), need in zip(likes, needs, strict=True)
    )


def _lora_linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, packed, absmax, absmax2, offset, bias, lora_A, lora_B, scaling, p, seed, _, *form = inputs
    _, t = output
    ctx.mark_non_differentiable(t)
    need = ctx.needs_input_grad
    x, t = (x if need[6] else None), (t if need[7] else None)
    ctx.save_for_backward(x, t, packed, absmax, absmax2, offset, lora_A, lora_B, seed)
    ctx.scaling, ctx.dropout_p, ctx.form = scaling, p, form
    ctx.bias_dtype = None if bias is None else bias.dtype


def _lora_linear_autograd(ctx: Any, dy: Tensor, dt: None) -> tuple[Tensor | None, ...]:
    *tensors, lora_A, lora_B, seed = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 5, 6, 7)]
    block_size, layout = ctx.form
    grads = call(
        "lora_linear_backward",
        dy,
        *tensors,
        lora_A,
        lora_B,
        ctx.scaling,
        ctx.dropout_p,
        seed,
        block_size,
        needs,
        layout,
    )
    dtypes = (dy.dtype, ctx.bias_dtype, lora_A.dtype, lora_B.dtype)
    dx, dbias, dA, dB = (
        (g if g.dtype == dtype else g.to(dtype)) if need else None
        for g, dtype, need in zip(grads, dtypes, needs, strict=True)
    )
    return dx, None, None, None, None, dbias, dA, dB, None, None, None, None, None, None


define(
    "quantize",
    "(Tensor w, int block_size, bool check) -> (Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
define(
    "quantize_mse",
    "(Tensor w, int block_size, bool signed, Tensor? weights, bool check) -> (Tensor, Tensor)",
    _quantize_mse,
    _quantize_fake,
)
define(
    "quantize_out",
    "(Tensor w, int block_size, bool check, Tensor(a!) packed, Tensor(b!) absmax) -> ()",
    _quantize_out,
    _nothing,
)
define(
    "quantize_absmax",
    "(Tensor absmax) -> (Tensor, Tensor, Tensor)",
    _quantize_absmax,
    _quantize_absmax_fake,
)
define(
    "quantize_absmax_out",
    "(Tensor absmax, Tensor(a!) codes, Tensor(b!) absmax2, Tensor(c!) offset) -> ()",
    _quantize_absmax_out,
    _nothing,
)
define(
    "dequantize",
    f"({WEIGHT}, SymInt[] shape, int block_size, ScalarType dtype, {LAYOUT}) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
define(
    "dequantize_out",
    f"({WEIGHT}, int block_size, Tensor(a!) out, {LAYOUT}) -> ()",
    _dequantize_out,
    _nothing,
)
define(
    "embedding",
    f"(Tensor rows, {WEIGHT}, SymInt k, int block_size, ScalarType dtype) -> Tensor",
    _embedding,
    _embedding_fake,
)
define(
    "repack",
    "(Tensor packed, Tensor absmax, SymInt rows, SymInt columns, str layout) -> (Tensor, Tensor)",
    _repack,
    _repack_fake,
)
define(
    "linear_backward",
    f"(Tensor dy, {WEIGHT}, SymInt in_features, int block_size, {LAYOUT}) -> Tensor",
    _linear_backward,
    lambda dy, *args: dy.new_empty((*dy.shape[:-1], args[4])),
    _no_double_backward,
    rows=True,
)
define(
    "linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, SymInt out_features, int block_size, {LAYOUT}) -> Tensor",
    _linear,
    _linear_fake,
    _linear_autograd,
    _linear_setup_context,
    rows=True,
)
define(
    "scaled_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, Tensor? input_factor, Tensor? output_factor, bool need_y,"
    f" SymInt out_features, int block_size, {LAYOUT}) -> (Tensor, Tensor)",
    _scaled_linear,
    _scaled_linear_fake,
    _scaled_linear_autograd,
    _scaled_linear_setup_context,
)
define(
    "lora_linear_backward",
    f"(Tensor dy, Tensor? x, Tensor? t, {WEIGHT}, {_LORA}, int block_size, bool[] needs, "
    f"{LAYOUT}) -> (Tensor, Tensor, Tensor, Tensor)",
    _lora_linear_backward,
    _lora_linear_backward_fake,
    _no_double_backward,
    direct=_lora_linear_gradients,
)
define(
    "lora_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, {_LORA}, bool need_t, int block_size, {LAYOUT})"
    " -> (Tensor, Tensor)",
    _lora_linear,
    _lora_linear_fake,
    _lora_linear_autograd,
    _lora_linear_setup_context,
)
