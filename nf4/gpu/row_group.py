"""Multiply one or two rows by several weights on a GPU, in one launch, where that is the plan."""

from collections.abc import Sequence

from torch import Tensor

from nf4.gpu.plan import choose
from nf4.kernels import row_group as kernel
from nf4.kernels.row_group import MOST
from nf4.tensor import Weight
from nf4.tools.rows import as_rows, unflattened
from nf4.tools.terms import LowRank


def linear_group(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    low_ranks: Sequence[LowRank] = (),
) -> list[Tensor] | None:
    """Return x @ W.T + bias of each weight, with its low-rank update; None if each has its launch.

    Args:
        x: floating ``[..., K]``, contiguous.
        weights: W ``[N, K]`` of each.
        biases: floating ``[N]`` of each or None, contiguous.
        low_ranks: of each, without dropout and contiguous, or none at all.

    Returns:
        dtype of x ``[..., N]`` of each, the bits of `nf4.gpu.linear` or `nf4.gpu.lora_linear`.
    """
    rows = x.numel() // x.shape[-1]
    if not rows:
        return None
    updates: Sequence[LowRank | None] = low_ranks or [None] * len(weights)
    op = "lora_linear" if low_ranks else "linear"
    plans = [choose(op, rows, w, x.dtype, u).how for w, u in zip(weights, updates, strict=True)]
    if set(plans) != {"matmul_row"} or not 2 <= len(weights) <= MOST:
        return None
    if not (_alike(biases) and _alike([u.lora_A for u in low_ranks])):
        return None
    if not _alike([u.lora_B for u in low_ranks]) or len({u.lora_A.shape for u in low_ranks}) > 1:
        return None
    whole = [weight.contiguous() for weight in weights]
    flat = as_rows(x)
    t = kernel.down_group(flat, [u.lora_A for u in low_ranks]) if low_ranks else None
    factors = [(u.lora_B, u.scaling) for u in low_ranks]
    ys = kernel.row_group(flat, whole, biases, t, factors)
    return [unflattened(y, x) for y in ys]


def _alike(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether tensors are of one dtype, or none."""
    return len({None if tensor is None else tensor.dtype for tensor in tensors}) <= 1
