"""Double quantization of the scales in one pass, after their mean.

Equal to nf4/reference/quantize_absmax.py in every bit.
"""

import numpy as np
import torch
from torch import Tensor

from nf4.codebook import (
    ABSMAX_BLOCK_SIZE,
    LARGEST_ABSMAX,
    SMALLEST_ABSMAX,
    absmax_thresholds,
)
from nf4.cpu._memory import array_of
from nf4.cpu._threads import fork, spread
from nf4.cpu.dequantize import compiled

GRAIN = 64  # parts of 256 scales worth a thread of their own


@compiled
def _loop(absmax, offset, thresholds, codes, absmax2, begin, end):  # type: ignore[no-untyped-def]
    d = np.empty(ABSMAX_BLOCK_SIZE, np.float32)
    for part in range(begin, end):
        scales = absmax[part * ABSMAX_BLOCK_SIZE : (part + 1) * ABSMAX_BLOCK_SIZE]
        largest = np.float32(0)
        for i in range(len(scales)):
            d[i] = scales[i] - offset
            if np.isinf(d[i]) and np.isfinite(scales[i]) and np.isfinite(offset):
                d[i] = np.float32(np.copysign(LARGEST_ABSMAX, d[i]))
            if not abs(d[i]) <= largest:  # a NaN stays
                largest = abs(d[i])
                if np.isnan(largest):
                    break
        if largest < np.float32(SMALLEST_ABSMAX):
            largest = np.float32(0)
        absmax2[part] = largest
        scale = np.float32(0)
        if largest != np.float32(0):
            scale = np.float32(1) / largest
        for i in range(len(scales)):
            value = d[i] * scale
            # Of 255 thresholds, those below: halved eight times, without a branch to foresee
            below = 0
            for step in (128, 64, 32, 16, 8, 4, 2, 1):
                below += step * int(not thresholds[below + step - 1] >= value)
            codes[part * ABSMAX_BLOCK_SIZE + i] = below


@compiled
def _share(absmax, offset, thresholds, codes, absmax2, begin, end, team):  # type: ignore[no-untyped-def]
    args = (absmax, offset, thresholds, codes, absmax2)
    fork(_loop, args, begin, end, team)


def quantize_absmax(
    absmax: Tensor, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales; arguments and results as in nf4/reference/quantize_absmax.py."""
    absmax = absmax.detach().contiguous()
    blocks = absmax.numel()
    # By numpy, on this thread: waking PyTorch's costs more than the sum
    total = array_of(absmax).sum(dtype=np.float64)
    offset = torch.tensor(total / max(blocks, 1), dtype=torch.float32, device="cpu")
    codes = torch.empty(blocks, dtype=torch.uint8, device="cpu")
    absmax2 = torch.empty(-(-blocks // ABSMAX_BLOCK_SIZE), dtype=torch.float32, device="cpu")
    spread(
        _share,
        range(len(absmax2)),
        GRAIN,
        array_of(absmax),
        np.float32(offset.item()),
        absmax_thresholds(torch.device("cpu")).numpy(),
        array_of(codes),
        array_of(absmax2),
    )
    if out is None:
        return codes, absmax2, offset
    return out[0].copy_(codes), out[1].copy_(absmax2), out[2].copy_(offset)
