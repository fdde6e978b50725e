"""Let functions of rows ``[M, K]`` take tensors of any number of dimensions."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """Return ``[..., K]`` as ``[M, K]``."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unflattened(y: Tensor, like: Tensor) -> Tensor:
    """Return rows ``[M, N]`` as ``[..., N]`` like a tensor ``[..., K]``.

    No view of y to autograd, which would not let it be written to in place.
    """
    if like.ndim == 2:
        return y
    out: Tensor = torch.ops.aten._unsafe_view.default(y, (*like.shape[:-1], y.shape[-1]))
    return out


def of_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of x ``[M, K]`` whose first result is ``[M, N]`` take ``[..., K]``."""
    return _flattening(function, 1)


def of_both_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do as `of_rows` for a function whose second argument is a tensor of rows too, or None."""
    return _flattening(function, 2)


def _flattening(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    @wraps(function)
    def flattening(*args: Any) -> Any:
        rows = [None if x is None else as_rows(x) for x in args[:count]]
        first, *others = function(*rows, *args[count:])
        return first if first is None else unflattened(first, args[0]), *others

    return flattening
