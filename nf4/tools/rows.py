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

    @wraps(function)
    def flattening(x: Tensor, *args: Any) -> Any:
        first, *others = function(as_rows(x), *args)
        return first if first is None else unflattened(first, x), *others

    return flattening


def of_both_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do as `of_rows` for a function whose second argument is a tensor of rows too, or None."""

    @wraps(function)
    def flattening(x: Tensor, y: Tensor | None, *args: Any) -> Any:
        first, *others = function(as_rows(x), None if y is None else as_rows(y), *args)
        return first if first is None else unflattened(first, x), *others

    return flattening
