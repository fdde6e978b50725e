"""The NF4 levels, their thresholds, and the 256-entry map of double-quantized scales.

Every constant of the format lives here and nowhere else. The 16 levels are those of QLoRA
(https://arxiv.org/abs/2305.14314, section 3); `derive_nf4_levels` computes them from the normal
distribution. The scale map is the signed dynamic data type of Dettmers et al. 2022
(https://arxiv.org/abs/2110.02861, section 2.1).

The command line checks what it is given by these before torch is imported; the functions that
return tensors import it.
"""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ABSMAX_BLOCK_SIZE = 256
SCALES = ("absmax", "mse", "mse-positive")  # how a block's scale is found, see `nf4.quantize`
ABSMAX_ZERO_CODE = 127
# A block of fp32 subnormals quantizes as zero: the reciprocal of its absmax may overflow.
SMALLEST_ABSMAX = 2.0**-126
LARGEST_ABSMAX = (2 - 2.0**-23) * 2.0**127  # fp32's largest: a scale is never rounded to infinity


def check_block_size(block_size: int) -> int:
    """Return block_size as an int, or raise TypeError or ValueError."""
    if isinstance(block_size, bool) or not hasattr(type(block_size), "__index__"):
        raise TypeError(f"block_size: expected an int, got {type(block_size).__name__}")
    size = operator.index(block_size)
    if size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected a power of two from 32 to 4096, got {size}")
    return size


def check_scale(scale: str) -> str:
    """Return how scales are found, or raise ValueError if that is not known."""
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    return scale


def derive_nf4_levels() -> Tensor:
    """Derive the 16 levels from quantiles of the normal distribution, with scipy.

    Returns:
        float32 ``[16]``, ascending; equal to `NF4_LEVELS` bit for bit.
    """
    import torch
    from scipy.stats import norm

    # The probabilities are rounded to fp32 before the quantile, as when the levels were published.
    offset, cpu, fp32 = 0.9677083, torch.device("cpu"), torch.float32
    positive, negative = (
        norm.ppf(torch.linspace(offset, 0.5, n, dtype=fp32, device=cpu)[:-1].double().numpy())
        for n in (9, 8)
    )
    quantiles = sorted([*positive.tolist(), 0.0, *(-negative).tolist()])
    levels = torch.tensor(quantiles, dtype=fp32, device=cpu)
    return levels / levels.max()


@lru_cache
def nf4_levels(device: torch.device) -> Tensor:
    """Return the levels as float32 ``[16]`` on a device."""
    import torch

    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@lru_cache
def nf4_thresholds() -> tuple[float, ...]:
    """Return the 15 fp32 midpoints of neighbouring levels; a value above the i-th has code > i."""
    import torch

    levels = nf4_levels(torch.device("cpu"))
    return tuple(((levels[1:] + levels[:-1]) / 2).tolist())


@lru_cache
def nf4_byte_levels(device: torch.device) -> Tensor:
    """Return both levels of every byte, the high nibble first, as float32 ``[256, 2]``."""
    import torch

    byte = torch.arange(256, device=device)
    return nf4_levels(device)[torch.stack([byte >> 4, byte & 15], dim=1)]


@lru_cache
def absmax_map(device: torch.device) -> Tensor:
    """Return the map from 8-bit scale codes to [-1, 1] as float32 ``[256]``, ascending."""
    import torch

    cpu = torch.device("cpu")
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device=cpu)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device=cpu)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


@lru_cache
def absmax_thresholds(device: torch.device) -> Tensor:
    """Return float32 ``[255]``: x is nearer to entry i + 1 of `absmax_map` than to i iff x > t[i].

    The midpoints are exact in float64; rounded down to float32 they order every float32 x the same.
    """
    import torch

    levels = absmax_map(torch.device("cpu")).double()
    middles = (levels[1:] + levels[:-1]) / 2
    rounded = middles.float()
    down = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.double() > middles, down, rounded).to(device)
