"""Constants of the search that nf4/reference/quantize_mse.py tells of."""

from functools import lru_cache

import torch
from torch import Tensor

from nf4.codebook import NF4_LEVELS
from nf4.tools.caches import forgettable

X_UNIT, LEVEL_UNIT, IMPORTANCE_UNIT = 2.0**-13, 2.0**-10, 2.0**-15
CANDIDATES = tuple(k / 32 for k in (*range(8, 18, 2), *range(18, 39)))
REFINEMENTS = 2
LEVELS = tuple(round(level / LEVEL_UNIT) for level in NF4_LEVELS)
LEVEL_STEPS = tuple(b - a for a, b in zip(LEVELS, LEVELS[1:], strict=False))


@forgettable
@lru_cache
def candidates(device: torch.device) -> Tensor:
    """Return the ratios of scale to absmax to try, as float64 on a device."""
    return torch.tensor(CANDIDATES, dtype=torch.float64, device=device)
