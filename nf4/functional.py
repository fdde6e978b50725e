"""Quantize, dequantize and multiply: the public functions; they check all arguments.

What they compute, and how gradients flow, is in the operators of `nf4.ops`.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nf4.ops import replay
from nf4.ops.checks import (
    check_block_size,
    check_dequantize_out,
    check_quantize_out,
    check_scale,
    check_weight,
    check_weights,
)
from nf4.ops.products import NUMBERS, multiply, multiply_lora, multiply_scaled
from nf4.ops.registry import call, resolved
from nf4.reference import dequantize_absmax as reference
from nf4.tensor import NF4Tensor, check_fragments, check_nf4, packed_shape
from nf4.tools.terms import Dropout


def quantize(
    w: Tensor,
    block_size: int = 64,
    double_quant: bool = True,
    *,
    scale: str = "absmax",
    weights: Tensor | None = None,
    check: bool | None = None,
    out: NF4Tensor | None = None,
) -> NF4Tensor:
    """Quantize a tensor to 4-bit NormalFloat.

    Args:
        w: float32, float16 or bfloat16, any shape; left unchanged.
        block_size: elements that share one scale, a power of two from 32 to 4096. Blocks run over
            the flattened tensor; the last may be partial.
        double_quant: quantize the scales to 8 bits too: 4.127 instead of 4.5 bits per weight at
            block size 64.
        scale: how the scale of a block is found. "absmax" takes its largest magnitude, "mse" the
            one of either sign that costs least squared error, "mse-positive" the best positive
            one. The format is the same, and what reads one reads all.
        weights: floating ``[w.shape[-1]]``, finite, none below 0, on the device of w: what the
            squared error of an element in each column counts in that search, as the second moment
            of a layer's input, which `nf4.collect_activation_stats` gathers; all the same by
            default. Only for "mse" and "mse-positive".
        check: whether to look for NaN and infinities. By default only where the answer costs no
            waiting, on a CPU: a GPU would have to be waited for. Unchecked, a block that holds one
            gets a scale that is not finite either, and never dequantizes to finite values.
        out: an NF4Tensor to overwrite, quantized alike, on the device of w; it is returned.

    Returns:
        NF4Tensor on the device of w.

    Raises:
        TypeError: w is no dense tensor of a supported dtype, block_size no integer, or weights no
            floating tensor.
        ValueError: block_size or scale is not supported, weights or out do not fit, or w was
            checked and holds NaN or an infinity; the message names the first such index, and out
            is as it was.

    Source: QLoRA, section 3 (https://arxiv.org/abs/2305.14314).
    """
    check_weight(w, "w")
    block_size = check_block_size(block_size)
    for name, value in (("double_quant", double_quant), ("check", check)):
        if not isinstance(value, bool) and not (name == "check" and value is None):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    check_scale(scale)
    if weights is not None:
        weights = check_weights(weights, w, scale)
    if check is None:
        check = w.device.type == "cpu"
    w = w.detach()
    if out is not None:
        check_quantize_out(out, w, block_size, double_quant)
        if scale == "absmax":
            return _quantize_into(out, w, check)
        found = quantize(w, block_size, double_quant, scale=scale, weights=weights, check=check)
        for old, new in zip(out.tensors(), found.tensors(), strict=True):
            old.detach().copy_(new)
        return out
    if scale == "absmax":
        packed, absmax = call("quantize", w, block_size, check)
    else:
        packed, absmax = call("quantize_mse", w, block_size, scale == "mse", weights, check)
    packed = packed.view(packed_shape(w.shape))
    if not double_quant:
        return NF4Tensor(packed, absmax, w.shape, w.dtype, block_size)
    codes, absmax2, offset = call("quantize_absmax", absmax)
    return NF4Tensor(packed, codes, w.shape, w.dtype, block_size, absmax2, offset)


def _quantize_into(out: NF4Tensor, w: Tensor, check: bool) -> NF4Tensor:
    packed = out.packed.detach()
    if out.absmax2 is None or out.offset is None:
        call("quantize_out", w, out.block_size, check, packed, out.absmax.detach())
        return out
    absmax = torch.empty_like(out.absmax, dtype=torch.float32)
    call("quantize_out", w, out.block_size, check, packed, absmax)
    parts = (out.absmax.detach(), out.absmax2.detach(), out.offset.detach())
    call("quantize_absmax_out", absmax, *parts)
    return out


def dequantize(
    q: NF4Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Return the dense tensor that q stands for.

    Args:
        q: a quantized tensor.
        dtype: floating dtype of the result; that of the quantized tensor, or of out, by default.
        out: floating ``q.shape`` on the device of q, of any strides; it is overwritten and
            returned.

    Returns:
        dtype ``q.shape``: level times scale in fp32, rounded once.

    Raises:
        TypeError: q is no NF4Tensor, or dtype not floating.
        ValueError: the parts of q do not fit together, or out does not fit q.
    """
    check_nf4(q)
    if out is not None:
        check_dequantize_out(out, q, dtype)
        if not torch.compiler.is_compiling() and out.is_neg():  # a view that is to be negated
            out.copy_(dequantize(q, out.dtype))
            return out
        into = (*q.parts(), q.block_size, out.detach(), q.layout)
        resolved("dequantize_out", into)(*into)
        return out
    dtype = q.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating torch.dtype, got {dtype}")
    form = (list(q.shape), q.block_size, dtype, q.layout)
    given = (*q.parts(), *form)
    result: Tensor = resolved("dequantize", given)(*given)
    return result


def scales_of(q: NF4Tensor) -> Tensor:
    """Return the scales of a tensor's blocks as numbers: float32, in the order of its layout."""
    return reference.scales_of(q.as_weight()).detach()


def dequantize_rows(q: NF4Tensor, step: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield a matrix some rows at a time, so that it is never dense as a whole.

    Args:
        q: a quantized matrix ``[N, K]``.
        step: about how many rows at a time: the next number of whole blocks.
        dtype: floating, of the rows.

    Yields:
        Which rows, and their dense values ``[rows, K]``.
    """
    q = to_rows(q)
    n, k = q.shape
    absmax = scales_of(q)
    whole = q.block_size // math.gcd(q.block_size, k)  # rows that end where a block does
    step = -(-step // whole) * whole
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        start, stop = first * k, rows.stop * k
        shape = torch.Size((rows.stop - first, k))
        packed = q.packed.detach().view(-1)[start // 2 : -(-stop // 2)].view(packed_shape(shape))
        scales = absmax[start // q.block_size : -(-stop // q.block_size)]
        yield rows, dequantize(NF4Tensor(packed, scales, shape, q.dtype, q.block_size), dtype)


def embedding(input: Tensor, q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return rows of a quantized matrix; only those are made dense.

    Args:
        input: int32 or int64, any shape: which rows.
        q: quantized ``[N, K]``, in rows.
        dtype: floating dtype of the result; that of q by default.

    Returns:
        dtype ``[*input.shape, K]``, the bits of ``dequantize(q, dtype)[input]``.

    Raises:
        TypeError: input is no tensor of integers, or q no NF4Tensor.
        ValueError: q is no matrix, not in rows, or on another device than input.
        IndexError: a row is outside [0, N).
    """
    check_nf4(q)
    if q.ndim != 2 or q.layout != "rows":
        raise ValueError(
            f"q: expected a quantized matrix in rows, got {tuple(q.shape)}, layout {q.layout!r}"
        )
    if not isinstance(input, Tensor) or input.dtype not in (torch.int32, torch.int64):
        kind = getattr(input, "dtype", type(input).__name__)
        raise TypeError(f"input: expected an int32 or int64 tensor, got {kind}")
    if input.device != q.device:
        raise ValueError(f"input: expected device {q.device}, where q is, got {input.device}")
    dtype = q.dtype if dtype is None else dtype
    k = q.shape[1]
    parts = [None if part is None else part.detach() for part in q.parts()]
    found: Tensor = call("embedding", input.reshape(-1).long(), *parts, k, q.block_size, dtype)
    return found.view(*input.shape, k)


def to_fragments(q: NF4Tensor) -> NF4Tensor:
    """Return q in the order that tensor cores read; the same codes, scales and size.

    Args:
        q: a quantized matrix ``[N, K]``, N a multiple of 16, K of 64 and of the block size.

    Raises:
        TypeError: q is no NF4Tensor.
        ValueError: q has another shape; the parts of q do not fit together.

    The order is described in nf4/reference/repack.py.
    """
    return _repack(q, "fragments")


def to_rows(q: NF4Tensor) -> NF4Tensor:
    """Return q in row order, that of bitsandbytes and of every file: undoes `to_fragments`.

    Raises:
        TypeError: q is no NF4Tensor.
        ValueError: the parts of q do not fit together.
    """
    return _repack(q, "rows")


def _repack(q: NF4Tensor, layout: str) -> NF4Tensor:
    check_nf4(q)
    if q.layout == layout:
        return q
    check_fragments(q.shape, q.block_size, "q")
    parts = (q.packed.detach(), q.absmax.detach(), *q.shape)
    packed, absmax = call("repack", *parts, layout)
    return replace(q, packed=packed, absmax=absmax, layout=layout)


def linear(
    x: Tensor,
    q: NF4Tensor,
    bias: Tensor | None = None,
    *,
    input_factor: Tensor | None = None,
    output_factor: Tensor | None = None,
) -> Tensor:
    """Return x @ W.T + bias for a quantized W, with gradients for x, bias and factors.

    Args:
        x: float32, float16, bfloat16 or float64 ``[..., K]``. Autocast applies as to
            ``torch.nn.functional.linear``.
        q: quantized W ``[N, K]``.
        bias: floating ``[N]`` or None.
        input_factor: floating ``[K]``, of each input, whose product is rounded to the dtype of x.
        output_factor: floating ``[N]``, of each output, bias included.

    Returns:
        dtype of x ``[..., N]``; sums in fp32, one rounding, and another one where the gradient of
        output_factor is wanted or a library multiplies.

    Raises:
        TypeError: an argument is no tensor of the kind named here.
        ValueError: shapes or devices do not fit together.

    Source of the factors: (IA)³ (https://arxiv.org/abs/2205.05638, section 3.3).
    """
    if input_factor is not None or output_factor is not None:
        return multiply_scaled(x, q, bias, input_factor, output_factor)
    y = replay.product(q, None, x, (bias,), None, lambda: multiply(x, q, bias))
    return multiply(x, q, bias) if y is None else y


def lora_linear(
    x: Tensor,
    q: NF4Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return x @ W.T + scaling * dropout(x) @ lora_A.T @ lora_B.T + bias for a quantized W.

    Gradients flow to x, bias, lora_A and lora_B. Kept for backward are the packed weight, x and
    x @ lora_A.T; no dequantized weight and no dropout mask.

    Args:
        x: float32, float16, bfloat16 or float64 ``[..., K]``. Autocast applies as to
            ``torch.nn.functional.linear``.
        q: quantized W ``[N, K]``.
        lora_A: floating ``[r, K]``, rounded to the dtype of x.
        lora_B: floating ``[N, r]``, rounded to the dtype of x.
        scaling: factor of the low-rank term, in PEFT lora_alpha / r. A tensor ``[]`` is multiplied
            into lora_B in fp32, and its value never asked for.
        bias: floating ``[N]`` or None.
        dropout_p: probability of dropping an element of x before lora_A, in [0, 1).
        seed: int64 ``[]``, fixes the dropout mask; drawn from torch's generator by default.

    Returns:
        dtype of x ``[..., N]``.

    Raises:
        TypeError: an argument is no tensor of the kind named here.
        ValueError: shapes or devices do not fit together, or dropout_p is outside [0, 1).

    Source: LoRA (https://arxiv.org/abs/2106.09685, section 4.1).
    """
    terms = (x, q, (lora_A, lora_B), scaling, bias)
    plain = type(scaling) in NUMBERS and type(dropout_p) in NUMBERS
    if plain and dropout_p == 0 and seed is None:
        others = (bias, lora_A, lora_B)
        long = partial(multiply_lora, *terms)
        y = replay.product(q, None, x, others, scaling, long)
        if y is not None:
            return y
    return multiply_lora(*terms, Dropout(dropout_p, seed))
