"""The dropout mask of nf4/reference/dropout_mask.py, bit for bit, in one pass.

Philox4x32-10 gives four words, and so eight halves of 16 bits, for each counter.
"""

import numpy as np
import torch
from torch import Tensor

from nf4.cpu._memory import array_of, new_empty
from nf4.cpu._threads import fork, spread
from nf4.cpu.dequantize import compiled
from nf4.tools.dropout import dropout_threshold
from nf4.tools.terms import Dropout

GRAIN = 1 << 14  # counters worth a thread of their own
_LANES = 64  # counters at a time, for the compiler to take many together
_MASK = np.uint64(0xFFFFFFFF)
_UP = np.uint64(32)


@compiled
def _loop(key, threshold, kept, begin, end):  # type: ignore[no-untyped-def]
    words = np.empty((4, _LANES), np.uint64)
    c0, c1, c2, c3 = words[0], words[1], words[2], words[3]
    for first in range(begin * _LANES, end * _LANES, _LANES):
        for i in range(_LANES):
            c0[i] = np.uint64(first + i) & _MASK
            c1[i] = np.uint64(first + i) >> _UP
            c2[i] = np.uint64(0)
            c3[i] = np.uint64(0)
        k0, k1 = key & _MASK, key >> _UP
        for _ in range(10):
            for i in range(_LANES):
                low, high = np.uint64(0xD2511F53) * c0[i], np.uint64(0xCD9E8D57) * c2[i]
                c0[i] = (high >> _UP) ^ c1[i] ^ k0
                c2[i] = (low >> _UP) ^ c3[i] ^ k1
                c1[i] = high & _MASK
                c3[i] = low & _MASK
            k0 = (k0 + np.uint64(0x9E3779B9)) & _MASK
            k1 = (k1 + np.uint64(0xBB67AE85)) & _MASK
        for i in range(min(_LANES, (len(kept) - 8 * first + 7) // 8)):
            for j in range(min(8, len(kept) - 8 * (first + i))):
                half = words[j // 2, i] >> np.uint64(16 * (j % 2)) & np.uint64(0xFFFF)
                kept[8 * (first + i) + j] = half >= threshold


@compiled
def _share(key, threshold, kept, begin, end, team):  # type: ignore[no-untyped-def]
    args = (key, threshold, kept)
    fork(_loop, args, begin, end, team)


def dropout_mask(seed: Tensor, shape: torch.Size, p: float) -> Tensor:
    """Return which elements dropout keeps; arguments as in nf4/reference/dropout_mask.py."""
    kept = new_empty(shape, torch.bool)
    flat = kept.view(-1)
    key = np.uint64(int(seed) & (1 << 64) - 1)
    threshold = np.uint64(dropout_threshold(p))
    count = -(-flat.numel() // (8 * _LANES))
    spread(_share, range(count), GRAIN // _LANES, key, threshold, array_of(flat))
    return kept


def drop(x: Tensor, dropout: Dropout) -> Tensor:
    """Return x with what `dropout_mask` drops set to zero; x itself without a seed."""
    if dropout.seed is None:
        return x
    return torch.where(dropout_mask(dropout.seed, x.shape, dropout.p), x, 0)
