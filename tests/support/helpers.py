"""Small things that several tests need."""

import numpy as np
import torch


def lazy_zeros(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros whose memory is taken only where it is written."""
    return torch.from_numpy(np.zeros(n * dtype.itemsize, np.uint8)).view(dtype)
