"""Multiply rows by several weights, and by the first factors of their adapters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nf4.reference.lora_down import lora_down
from nf4.reference.matmul_row import matmul_row
from nf4.tensor import Weight
from nf4.tools.terms import NO_DROPOUT, Epilogue


def row_group(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    t: Tensor | None = None,
    factors: Sequence[tuple[Tensor, float]] = (),
) -> list[Tensor]:
    """Return what `matmul_row` does of each weight.

    Args:
        x: floating ``[M, K]``.
        weights: W ``[N, K]`` of each, in fragments.
        biases: floating ``[N]`` of each, or None.
        t: dtype of x ``[members, M, r]``, x @ lora_A.T of each, or None.
        factors: with t, lora_B ``[N, r]`` of each, and its scaling.

    Returns:
        y ``[M, N]`` of each.
    """
    found = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        terms = () if t is None else (t[i], *factors[i])
        found.append(matmul_row(x, weight, Epilogue(bias, *terms)))
    return found


def down_group(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return x @ lora_A.T of each factor ``[r, K]``: dtype of x ``[members, M, r]``."""
    return torch.stack([lora_down(x, lora_A, NO_DROPOUT) for lora_A in factors])
