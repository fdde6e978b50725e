"""Sums over rows of outer products, ``a.T @ b`` for a few columns of a: an adapter's gradients.

In bf16 they are taken in fp32 straight from the halves, a tile of 8 by 32 in registers, where a
library's product would first want both matrices in fp32 and does little for so few columns.
"""

import numpy as np
import torch
from torch import Tensor

from nf4.cpu._lanes import outer_sums
from nf4.cpu._memory import array_of, new_empty
from nf4.cpu._threads import fork, spread
from nf4.cpu.dequantize import compiled

_GROUP = 8  # columns of a at a time
TILE = 32  # columns of b at a time
MOST_COLUMNS = 64  # of a; with more the library's product is faster
GRAIN = 1 << 18  # products worth a thread of their own


@compiled
def _loop(a, b, out, begin, end):  # type: ignore[no-untyped-def]
    rows, r = a.shape
    n, k = out.shape[1], b.shape[1]
    flat_b, flat_out = b.reshape(-1), out.reshape(-1)
    for tile in range(begin, end):
        for first in range(0, r, _GROUP):
            part = a.reshape(-1)[first:]
            p, o = tile * TILE // 2, first * n + tile * TILE
            outer_sums(part, r, flat_b, k, p, rows, _GROUP, flat_out, o, n)


@compiled
def _share(a, b, out, begin, end, team):  # type: ignore[no-untyped-def]
    fork(_loop, (a, b, out), begin, end, team)


def fits(a: Tensor, b: Tensor) -> bool:
    """Return whether `across` takes these."""
    few = a.shape[1] <= MOST_COLUMNS and a.shape[0] > 0
    return a.dtype == b.dtype == torch.bfloat16 and few and b.shape[1] % TILE == 0


def across(a: Tensor, b: Tensor) -> Tensor:
    """Return a.T @ b in fp32.

    Args:
        a: bfloat16 ``[M, r]``.
        b: bfloat16 ``[M, N]``, fit for this, see `fits`.
    """
    rows, r = a.shape
    padded = a.float()
    if r % _GROUP:
        padded = torch.nn.functional.pad(padded, (0, _GROUP - r % _GROUP))
    out = new_empty((padded.shape[1], b.shape[1]), torch.float32)
    words = array_of(b.contiguous().view(torch.uint16)).view(np.uint32)
    tiles = range(b.shape[1] // TILE)
    grain = -(-GRAIN // (rows * padded.shape[1] * TILE))
    spread(_share, tiles, grain, array_of(padded.contiguous()), words, array_of(out))
    return out[:r] if r % _GROUP else out
