"""Factors of adapters that several processes share: each has its part, or all of them."""

from typing import Any

import torch
from torch import Tensor

from nf4.tools.ranks import is_sharded


def local_factor(factor: Any) -> Tensor:
    """Return this process's part of a factor; the gradient of what all have whole is summed."""
    if not is_sharded(factor):
        return factor  # type: ignore[no-any-return]
    if any(placement.is_shard() for placement in factor.placements):
        local: Tensor = factor.to_local()
        return local
    found: Tensor = _Whole.apply(factor)  # type: ignore[no-untyped-call]
    return found


class _Whole(torch.autograd.Function):
    """A factor that each process has whole, and multiplies by its part of something."""

    @staticmethod
    def forward(ctx: Any, factor: Any) -> Tensor:
        ctx.mesh = factor.device_mesh
        local: Tensor = factor.to_local()
        return local

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        (grad,) = grads
        parts = DTensor.from_local(grad, ctx.mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()])
