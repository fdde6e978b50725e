"""Other codebooks of 16 levels, to compare NF4 with: FP4, INT4, AF4, BOF4 and BOF4-S.

Only NF4 is a format here; these say what another would cost. Levels are divided by the largest, so
that a block's scale is the largest magnitude in it.

    nf4         QLoRA's (https://arxiv.org/abs/2305.14314)
    fp4         bitsandbytes': sign, two bits of exponent, one of mantissa, tiny subnormals
    e2m1        the OCP's FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6, both signs
    int4        symmetric integers, -7 to 7
    af4         least mean |x / M - q| on either side of 0, with -1, 0 and 1 among the levels, for
                each block size (https://arxiv.org/abs/2306.06965)
    bof4-mse    least mean squared error of x, with -1, 0 and 1 among them
    bof4-mae    the same for the absolute error (https://arxiv.org/abs/2505.06653)
    bof4s-mse   blocks divided by the value of largest magnitude itself, so that it becomes 1 and
    bof4s-mae   the level at -1 is free: BOF4-S of the same paper

AF4 and BOF4 are for values from N(0, 1), by Lloyd's algorithm: each level is moved to where its
cell costs least, and the cells to the midpoints, until nothing moves. theory.json has the result.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nf4.codebook import NF4_LEVELS
from nf4.error import tabulated
from nf4.error.distributions import Normal, scales
from nf4.ops.checks import check_block_size

Array = np.ndarray[Any, np.dtype[np.float64]]
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
COMPUTED = ("af4", "bof4-mse", "bof4-mae", "bof4s-mse", "bof4s-mae")
CODEBOOKS = ("nf4", "fp4", "e2m1", "int4", *COMPUTED)


def codebook(name: str, block_size: int = 64) -> tuple[float, ...]:
    """Return the distinct levels of a codebook, ascending, the largest magnitude 1.

    Args:
        name: one of `CODEBOOKS`.
        block_size: for which af4 and the bof4 kinds are computed.

    Raises:
        TypeError: block_size is no integer.
        ValueError: there is no such codebook, or block_size is not supported.
    """
    if name == "nf4":
        return NF4_LEVELS
    if name in ("fp4", "e2m1"):
        half = _FP4 if name == "fp4" else _E2M1
        return tuple(sorted({sign * level / half[-1] for level in half for sign in (-1, 1)}))
    if name == "int4":
        return tuple(i / 7 for i in range(-7, 8))
    if name in COMPUTED:
        return tabulated.levels(name, check_block_size(block_size))
    raise ValueError(f"codebook: expected one of {', '.join(CODEBOOKS)}, got {name!r}")


def levels_of(book: str | Sequence[float], block_size: int) -> tuple[tuple[float, ...], bool]:
    """Return levels, and whether blocks are divided by a signed scale.

    Args:
        book: the name of a codebook, or levels.
        block_size: see `codebook`.

    Raises:
        ValueError: the name is not known, or the levels do not ascend within [-1, 1].
    """
    if isinstance(book, str):
        return codebook(book, block_size), book.startswith("bof4s")
    levels = tuple(float(level) for level in book)
    rising = all(a < b for a, b in zip(levels, levels[1:], strict=False))
    if len(levels) < 2 or not rising or levels[0] < -1 or levels[-1] > 1:
        raise ValueError(f"codebook: expected levels that ascend within [-1, 1], got {levels}")
    return levels, False


def compute_codebook(name: str, block_size: int) -> tuple[float, ...]:
    """Compute the levels of least expected error, some of them fixed.

    Args:
        name: one of `COMPUTED`.
        block_size: for which.

    Given the scale M = m, other values of the block have the density of N(0, 1) on (-m, m). An
    error in x / M costs 1 for af4 and M or M^2, as it does in x, for bof4.
    """
    f = Normal()
    m, weight, *_ = scales(f, block_size, 0.2)
    weight = weight / (f.moment(0, m) - f.moment(0, -m))
    squared = name.endswith("mse")
    if name != "af4":
        weight = weight * (m**2 if squared else m)
    fixed = {7: 0.0, 15: 1.0} if name.startswith("bof4s") else {0: -1.0, 7: 0.0, 15: 1.0}
    levels = np.array(NF4_LEVELS)
    if 0 not in fixed:
        levels[:7] *= 0.9
    free = [i for i in range(16) if i not in fixed]
    for _ in range(20_000):
        edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        if name == "af4":  # the published levels come out so: nothing but 0 itself goes to 0
            edges[7:9] = 0.0
        place = _centroids if squared else _medians
        found = place(f, m, weight, edges[:-1][free], edges[1:][free], levels[free])
        moved = np.abs(found - levels[free]).max()
        levels[free] = found
        if moved < 1e-10:
            break
    return tuple(levels.tolist())


def _centroids(f: Normal, m: Array, weight: Array, low: Array, high: Array, _: Array) -> Array:
    """Return where the mean squared distance from x / M in each cell is least: the mean."""
    edges = [np.outer(edge, m) for edge in (low, high)]
    mass = f.moment(0, edges[1]) - f.moment(0, edges[0])
    first = f.moment(1, edges[1]) - f.moment(1, edges[0])
    return np.asarray((first / m) @ weight / (mass @ weight))


def _medians(f: Normal, m: Array, weight: Array, low: Array, high: Array, start: Array) -> Array:
    """Return where the mean distance from x / M in each cell is least: the median.

    By Newton's method from the level before, kept within the cell by bisection.
    """
    lower, upper, found = low.copy(), high.copy(), start.copy()
    ends = [f.moment(0, np.outer(edge, m)) @ weight for edge in (low, high)]
    half = (ends[0] + ends[1]) / 2
    for _ in range(60):
        at = np.outer(found, m)
        above = f.moment(0, at) @ weight - half
        step = above / ((f.density(at) * m) @ weight)
        lower, upper = np.where(above < 0, found, lower), np.where(above < 0, upper, found)
        moved, near = found - step, np.abs(step) < 1e-14
        inside = (moved > lower) & (moved < upper)
        found = np.where(near | inside, moved, (lower + upper) / 2)
        if near.all():
            break
    return np.asarray(found)
