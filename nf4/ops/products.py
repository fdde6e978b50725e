"""Products with a quantized weight, as layers and adapters call them: checked, and remembered.

The public ones of nf4/functional.py, and what only layers ask for.
"""

from functools import partial

import torch
from torch import Tensor

from nf4.ops import replay
from nf4.ops.checks import (
    check_dropout,
    check_floating,
    check_linear,
    check_lora,
    check_no_tangent,
    check_seed,
)
from nf4.ops.registry import call, is_transformed, resolved
from nf4.ops.scaled_linear import times
from nf4.tensor import NF4Tensor
from nf4.tools.rows import as_rows
from nf4.tools.terms import NO_DROPOUT, Dropout

NUMBERS = (int, float)


def multiply(
    x: Tensor, q: NF4Tensor, bias: Tensor | None, replays: replay.Replays | None = None
) -> Tensor:
    """Do as `nf4.linear`, and launch again what a layer remembers.

    Args:
        x: as in `nf4.linear`.
        q: the weight.
        bias: as in `nf4.linear`.
        replays: what a layer remembers of its weight; None to launch nothing again.
    """
    if replays is not None:
        y = replay.product(q, replays, x, (bias,), None, lambda: multiply(x, q, bias))
        if y is not None:
            return y
    return _multiplied(x, q, bias)[0]


def _multiplied(x: Tensor, q: NF4Tensor, bias: Tensor | None) -> tuple[Tensor, replay.Called]:
    """Return what `nf4.linear` does, and how it was computed."""
    check_linear(x, q, bias)
    check_no_tangent(x, bias)
    given = (_autocast(x), *q.parts(), bias, q.shape[0], q.block_size, q.layout)
    operator = resolved("linear", given)
    out: Tensor = operator(*given)
    return out, (operator, given[6:])


def multiply_in_layer(
    x: Tensor,
    q: NF4Tensor,
    bias: Tensor | None,
    replays: replay.Replays,
    factors: tuple[Tensor, Tensor] | tuple[()] = (),
    scaling: float | None = None,
) -> Tensor:
    """Do as `nf4.linear`, or `nf4.lora_linear` without dropout, and let `replay.again` know how.

    Args:
        x: as in `nf4.linear`.
        q: the weight of a layer.
        bias: as in `nf4.linear`.
        replays: what the layer remembers of its weight.
        factors: lora_A and lora_B, or none.
        scaling: as in `nf4.lora_linear`.
    """
    if factors:
        long = partial(_multiplied_lora, x, q, factors, 1.0 if scaling is None else scaling, bias)
    else:
        long = partial(_multiplied, x, q, bias)
    y = replay.product(q, replays, x, (bias, *factors), scaling, lambda: long()[0])
    if y is None:
        y, called = long()
        replay.remember(replays, q, x, (bias, *factors), scaling, called)
    return y


def multiply_scaled(
    x: Tensor,
    q: NF4Tensor,
    bias: Tensor | None,
    input_factor: Tensor | None = None,
    output_factor: Tensor | None = None,
) -> Tensor:
    """Do as `nf4.linear` with factors."""
    check_linear(x, q, bias)
    n, k = q.shape
    for name, factor, size in (
        ("input_factor", input_factor, k),
        ("output_factor", output_factor, n),
    ):
        if factor is not None:
            check_floating(factor, name, q)
            if factor.shape != (size,):
                raise ValueError(f"{name}: expected shape ({size},), got {tuple(factor.shape)}")
    check_no_tangent(x, bias, input_factor, output_factor)
    x = _autocast(x)
    if is_transformed():  # whose second derivatives the fused operator could not refuse
        x = x if input_factor is None else times(x, input_factor)
        y = multiply(x, q, bias)
        return y if output_factor is None else times(y, output_factor)
    needs = output_factor is not None and output_factor.requires_grad and torch.is_grad_enabled()
    rows = as_rows(x)
    form = (needs, n, q.block_size, q.layout)
    y, _ = call("scaled_linear", rows, *q.parts(), bias, input_factor, output_factor, *form)
    out: Tensor = y.view(*x.shape[:-1], n)
    return out


def multiply_lora(
    x: Tensor,
    q: NF4Tensor,
    factors: tuple[Tensor, Tensor],
    scaling: float | Tensor,
    bias: Tensor | None,
    dropout: Dropout = NO_DROPOUT,
    replays: replay.Replays | None = None,
) -> Tensor:
    """Do as `nf4.lora_linear`, and launch again what a layer remembers.

    Args:
        x: as in `nf4.lora_linear`.
        q: the weight.
        factors: lora_A and lora_B.
        scaling: as in `nf4.lora_linear`.
        bias: as in `nf4.lora_linear`.
        dropout: dropout_p and seed as in `nf4.lora_linear`.
        replays: what a layer remembers of its weight; None to launch nothing again.
    """
    lora_A, lora_B = factors
    again = replays is not None and not dropout.p and type(scaling) in NUMBERS
    if again and not (torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad)):
        long = partial(multiply_lora, x, q, factors, scaling, bias)
        y = replay.product(q, replays, x, (bias, *factors), scaling, long)
        if y is not None:
            return y
    return _multiplied_lora(x, q, factors, scaling, bias, dropout)[0]


def _multiplied_lora(
    x: Tensor,
    q: NF4Tensor,
    factors: tuple[Tensor, Tensor],
    scaling: float | Tensor,
    bias: Tensor | None,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, replay.Called]:
    """Return what `nf4.lora_linear` does, and how it was computed."""
    (lora_A, lora_B), (dropout_p, seed) = factors, dropout
    check_linear(x, q, bias)
    check_lora(x, q, lora_A, lora_B, scaling)
    check_no_tangent(x, bias, lora_A, lora_B)
    check_dropout(dropout_p, "dropout_p")
    if seed is not None:
        check_seed(seed, q)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
    if isinstance(scaling, Tensor):
        lora_B, scaling = times_scaling(lora_B, scaling), 1.0
    need_t = torch.is_grad_enabled() and lora_B.requires_grad
    low_rank = (lora_A, lora_B, float(scaling), float(dropout_p), seed)
    given = (_autocast(x), *q.parts(), bias, *low_rank, need_t, q.block_size, q.layout)
    operator = resolved("lora_linear", given)
    out: Tensor
    out, _ = operator(*given)
    return out, (operator, given[8:])


def times_scaling(lora_B: Tensor, scaling: Tensor) -> Tensor:
    """Return lora_B times a tensor ``[]``, in fp32 or fp64, without waiting for its value."""
    return lora_B.to(torch.promote_types(lora_B.dtype, torch.float32)) * scaling


def _autocast(x: Tensor) -> Tensor:
    """Cast x as autocast casts the input of a matrix product."""
    if not torch._C._is_any_autocast_enabled():
        return x
    kind = x.device.type
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    dtype = torch.get_autocast_dtype(kind)
    return x if x.dtype == dtype else x.to(dtype)
