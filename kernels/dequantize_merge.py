"""Dequantize a weight in fragments and add a low-rank update: out = round(W + scaling * B @ A).

One launch and one rounding, so that one library product gives y or the gradient of x, adapter
included: 2 r flops a weight more than dequantizing, whatever the number of rows. The kernel is that
of kernels/_merge.py.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

import torch
from torch import Tensor

from ..tensor import Weight
from ..tools.terms import LowRank
from ._aot import Variant
from ._merge import dense_launch, merge_variants


def dequantize_merge(
    weight: Weight, low_rank: LowRank, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Dequantize and add; arguments as in nf4/reference/dequantize_merge.py."""
    if out is None:
        out = torch.empty(tuple(weight.shape), dtype=dtype, device=weight.device)
    form, arguments = dense_launch(weight, low_rank, out)
    form(*arguments)
    return out


def variants() -> list[Variant]:
    """Return the compilations to report on: a small, a common and the largest rank."""
    return merge_variants("dequantize_merge", (16, 64, 256))
