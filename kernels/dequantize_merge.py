"""Dequantize a weight in fragments and add a low-rank update: out = round(W + scaling * B @ A).

One launch and one rounding, so that one library product gives y or the gradient of x, adapter
included: 2 r flops a weight more than dequantizing, whatever the number of rows. The kernel is that
of kernels/_merge.py.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

import torch
from torch import Tensor

from ._aot import Variant
from ._merge import merge_variants, write_dense


def dequantize_merge(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    block_size: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize and add; arguments as in nf4/reference/dequantize_merge.py."""
    if out is None:
        shape = (lora_B.shape[0], lora_A.shape[1])
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    write_dense(packed, absmax, absmax2, offset, lora_A, lora_B, scaling, block_size, out)
    return out


def variants() -> list[Variant]:
    """Return the compilations to report on: a small, a common and the largest rank."""
    return merge_variants("dequantize_merge", (16, 64, 256))
