"""Double quantization: the scales themselves to 8 bits.

    offset = mean(absmax)          d = absmax - offset          absmax2[j] = max |d| over block j
    code[i] = the entry of the 256-entry map nearest to d[i] * (1 / absmax2); a tie takes the lower

The mean is summed in float64 and rounded once, so that it does not depend on the order of the sum,
which differs between devices. A difference of finite numbers beyond fp32 is fp32's largest.
Source: QLoRA, section 3 (https://arxiv.org/abs/2305.14314).
"""

import torch
from torch import Tensor

from nf4.codebook import (
    ABSMAX_BLOCK_SIZE,
    LARGEST_ABSMAX,
    SMALLEST_ABSMAX,
    absmax_thresholds,
)
from nf4.reference._blocks import as_blocks


def quantize_absmax(
    absmax: Tensor, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales of `quantize`.

    Args:
        absmax: float32 ``[blocks]``.
        out: where to write the results; new by default.

    Returns:
        codes: uint8 ``[blocks]``.
        absmax2: float32 ``[ceil(blocks / 256)]``.
        offset: float32 ``[]``.
    """
    offset = absmax.double().sum().div(max(absmax.numel(), 1)).float()
    finite = absmax.isfinite() & offset.isfinite()
    d = absmax - offset
    d = torch.where(finite, d.clamp(-LARGEST_ABSMAX, LARGEST_ABSMAX), d)
    d = as_blocks(d, ABSMAX_BLOCK_SIZE)
    absmax2 = d.abs().amax(dim=1)
    absmax2 = torch.where(absmax2 < SMALLEST_ABSMAX, 0.0, absmax2)
    codes = absmax_codes(d, absmax2[:, None]).view(-1)[: absmax.numel()]
    if out is None:
        return codes, absmax2, offset
    return out[0].copy_(codes), out[1].copy_(absmax2), out[2].copy_(offset)


def absmax_codes(d: Tensor, absmax2: Tensor) -> Tensor:
    """Return the codes of the map's entries nearest to d relative to absmax2: uint8."""
    scaled = d * torch.where(absmax2 == 0, 0.0, 1 / absmax2)
    return torch.bucketize(scaled, absmax_thresholds(d.device), out_int32=True).to(torch.uint8)
