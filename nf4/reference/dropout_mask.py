"""Dropout without a stored mask: element i of a mask depends only on the seed and on i.

    word j = output j mod 4 of Philox-4x32-10(counter = j // 4, key = seed)
    keep i iff half i mod 2 of word i // 2, the lower first, >= p * 2**16, rounded

Sixteen bits are enough for a probability: it is off by at most 2**-17. They halve the work.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
(https://doi.org/10.1145/2063384.2063405); the same words as Triton's ``tl.randint4x``.
"""

import torch
from torch import Tensor

from nf4.tools.dropout import dropout_threshold
from nf4.tools.terms import Dropout

MASK32 = 0xFFFFFFFF


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Return four random 32-bit words for each counter.

    Args:
        seed: int64 ``[]``, the 64-bit key.
        counter: int64 ``[n]``, the low 64 bits of the 128-bit counter; the rest is zero.

    Returns:
        int64 ``[n, 4]``, values below 2**32.
    """
    c0, c1 = counter & MASK32, (counter >> 32) & MASK32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        high, low = (
            0xD2511F53 * c0,
            0xCD9E8D57 * c2,
        )  # 64-bit products; a wrapped sign bit is harmless
        c0 = ((low >> 32) & MASK32) ^ c1 ^ k0
        c2 = ((high >> 32) & MASK32) ^ c3 ^ k1
        c1, c3 = low & MASK32, high & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def dropout_mask(seed: Tensor, shape: torch.Size, p: float) -> Tensor:
    """Return which elements dropout keeps.

    Args:
        seed: int64 ``[]``.
        shape: sizes of the mask.
        p: probability of dropping an element, in [0, 1).

    Returns:
        bool ``shape``, true where the element is kept.
    """
    n = shape.numel()
    words = philox(seed, torch.arange(-(-n // 8), device=seed.device))
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).view(-1)[:n]
    return (halves >= dropout_threshold(p)).view(shape)


def drop(x: Tensor, dropout: Dropout) -> Tensor:
    """Return x with what `dropout_mask` drops set to zero; x itself without a seed."""
    if dropout.seed is None:
        return x
    return torch.where(dropout_mask(dropout.seed, x.shape, dropout.p), x, 0)
