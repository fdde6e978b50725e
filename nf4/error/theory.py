"""The error expected of absmax block quantization, by numerical integration.

A block holds B independent values x with a symmetric density f of variance 1. Its scale is
M = max |x|, of distribution G(m) = P(|x| <= m)^B; given M = m the B - 1 other values are
distributed as f on (-m, m), and the largest is +-m. A value is rounded to m times the nearest
level of the codebook. The inner integrals over a cell of the codebook are partial moments of f,
in closed form; the outer one over m is a trapezoid sum in z = log(G / (1 - G)), whose terms fall
off exponentially at both ends.

With double quantization the scale is M + d, where d is the rounding of M - E M by the 8-bit map
times the largest |M - E M| of 256 blocks: an integral over that largest value too.

What `nf4 error` compares is tabulated, in theory.json.

Sources: QLoRA (https://arxiv.org/abs/2305.14314, section 3); Yoshida 2023
(https://arxiv.org/abs/2306.06965, section 3: the distribution of x / M); BOF4
(https://arxiv.org/abs/2505.06653, section 3: the error weighted by M).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import special
from scipy.integrate import simpson

from nf4.codebook import ABSMAX_BLOCK_SIZE, absmax_map
from nf4.error import tabulated
from nf4.error.codebooks import levels_of
from nf4.error.distributions import Distribution, Normal, distribution_of, scales
from nf4.ops.checks import check_block_size
from nf4.tools.caches import forgettable

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class ExpectedError:
    """The error expected of values with variance 1; see `QuantizationError`.

    Attributes:
        mse: mean squared error.
        rmse: its square root.
        mae: mean absolute error.
        max_abs: mean of the largest absolute error of a tensor of `numel` values, as asked for.
        relative: the same as rmse, for values of variance 1.
        sqnr_db: ``-20 log10(relative)``.
    """

    mse: float
    rmse: float
    mae: float
    max_abs: float
    relative: float
    sqnr_db: float


def expected_error(
    block_size: int = 64,
    double_quant: bool = True,
    codebook: str | Sequence[float] = "nf4",
    distribution: str | Distribution = "normal",
    numel: int | None = None,
) -> ExpectedError:
    """Return the error expected of independent values of mean 0 and variance 1.

    Args:
        block_size: values that share one scale, a power of two from 32 to 4096.
        double_quant: whether the scales are quantized to 8 bits; many blocks are assumed. It is
            left out of max_abs.
        codebook: a name that `nf4.error.codebooks.codebook` knows, or levels, ascending in [-1, 1].
            A signed one, whose name says so, divides by the value of largest magnitude itself.
        distribution: "normal", "laplace", "student-t:NU" with NU > 2, or a `Distribution`.
        numel: values of the tensor whose largest error is asked for; one block by default.

    Returns:
        An `ExpectedError`; multiply mse by the variance of other values, the rest but sqnr_db by
        its root. mse, rmse and mae are within 1e-6.

    Raises:
        TypeError: block_size is no integer, or double_quant no bool.
        ValueError: block_size, codebook or distribution is not known, or numel below 1.
    """
    block_size = check_block_size(block_size)
    if not isinstance(double_quant, bool):
        raise TypeError(f"double_quant: expected a bool, got {type(double_quant).__name__}")
    if numel is not None and numel < 1:
        raise ValueError(f"numel: expected at least 1, got {numel}")
    levels, signed = levels_of(codebook, block_size)
    f = distribution_of(distribution)
    if isinstance(codebook, str) and f == Normal() and numel in (None, block_size):
        known = tabulated.errors(codebook, block_size, double_quant)
        if known is not None:
            return _of(*known)
    return _expected(block_size, double_quant, levels, signed, f, numel or block_size)


def compute_error(
    codebook: str | Sequence[float], block_size: int, double_quant: bool, name: str
) -> ExpectedError:
    """Compute what `nf4.error.tabulated` holds, for N(0, 1) and tensors of one block.

    Args:
        codebook: its name, or its levels.
        block_size: values that share one scale.
        double_quant: whether the scales are quantized to 8 bits.
        name: of the codebook, which says whether scales are signed.
    """
    levels, _ = levels_of(codebook, block_size)
    signed = name.startswith("bof4s")
    return _expected(block_size, double_quant, levels, signed, Normal(), block_size)


def _of(mse: float, mae: float, max_abs: float) -> ExpectedError:
    rmse = math.sqrt(mse)
    return ExpectedError(mse, rmse, mae, max_abs, rmse, -20 * math.log10(rmse))


@forgettable
@lru_cache(maxsize=256)
def _expected(
    block_size: int,
    double_quant: bool,
    levels: tuple[float, ...],
    signed: bool,
    f: Distribution,
    numel: int,
) -> ExpectedError:
    m, weight, *_ = scales(f, block_size)
    book = np.array(levels)
    ends = [1.0] if signed else [1.0, -1.0]
    of_max = np.array([np.min(np.abs(book - end)) for end in ends])
    found = {}
    for power in (1, 2):
        others = (block_size - 1) * conditional(f, book, m, power)
        error = (others + np.mean(of_max**power) * m**power) / block_size
        found[power] = float(np.sum(weight * error))
    if double_quant:
        for power, change in _changes_by_double_quant(f, block_size, book, ends).items():
            found[power] += float(change)
    max_abs = _expected_max(f, block_size, book, float(of_max.max()), numel)
    return _of(found[2], found[1], max_abs)


def cells(book: Array) -> Array:
    """Return the edges of the levels' cells in [-1, 1]: midpoints between -1 and 1."""
    return np.concatenate([[-1.0], np.clip((book[1:] + book[:-1]) / 2, -1, 1), [1.0]])


def conditional(f: Distribution, book: Array, m: Array, power: int) -> Array:
    """Return E |x - m q(x / m)|^power over x of density f on (-m, m), for each m.

    Args:
        f: distribution of the values.
        book: levels, ascending.
        m: scales.
        power: 1 or 2.
    """
    edges = cells(book)[:, None] * m  # [levels + 1, m]
    level = book[:, None] * m
    total = f.moment(0, m) - f.moment(0, -m)
    if power == 2:
        parts = [np.diff(f.moment(p, edges), axis=0) for p in (0, 1, 2)]
        squared = parts[2] - 2 * level * parts[1] + level**2 * parts[0]
        return np.asarray(squared.sum(axis=0) / total)
    middle = np.clip(level, edges[:-1], edges[1:])
    zero, one = ([f.moment(p, x) for x in (edges[:-1], middle, edges[1:])] for p in (0, 1))
    below = level * (zero[1] - zero[0]) - (one[1] - one[0])
    above = (one[2] - one[1]) - level * (zero[2] - zero[1])
    return np.asarray((below + above).sum(axis=0) / total)


def _expected_max(
    f: Distribution, block_size: int, book: Array, of_max: float, numel: int
) -> float:
    """Return the mean of the largest error of a tensor: the integral of P(largest > t) over t."""
    m, weight, *_ = scales(f, block_size, 0.2)
    edges, level = cells(book)[:, None] * m, book[:, None] * m
    total = f.moment(0, m) - f.moment(0, -m)
    blocks = numel / block_size

    def exceeds(t: float) -> float:
        low, high = np.maximum(edges[:-1], level - t), np.minimum(edges[1:], level + t)
        inside = np.where(high > low, f.moment(0, high) - f.moment(0, low), 0).sum(axis=0) / total
        within = np.clip(inside, 0, 1) ** (block_size - 1) * (of_max * m <= t)
        return -float(np.expm1(blocks * np.log(max(np.sum(weight * within), 1e-300))))

    widest = float(np.max(np.maximum(book - cells(book)[:-1], cells(book)[1:] - book)))
    coarse = np.geomspace(1e-6, max(widest, of_max) * m[-1], 120)
    chance = np.array([exceeds(t) for t in coarse])
    first = int(np.argmax(chance < 1 - 1e-12))
    last = len(chance) - int(np.argmax(chance[::-1] > 1e-12))
    low, high = coarse[max(first - 1, 0)], coarse[min(last, len(coarse) - 1)]
    v = np.linspace(math.log(low), math.log(high), 301)  # the integral over log t
    values = np.exp(v) * np.array([exceeds(math.exp(x)) for x in v])
    return float(low + simpson(values, x=v))


def _changes_by_double_quant(
    f: Distribution, block_size: int, book: Array, ends: list[float]
) -> dict[int, float]:
    """Return by how much quantized scales change the mean absolute and the mean squared error.

    x is rounded with M, but scaled with M + d. With S the largest |M - E M| of a group of 256
    blocks, d = S r((M - E M) / S) - (M - E M), r rounding to the map; one block of the group is S
    itself, where r(1) is exact and r(-1) is the map's lowest entry.
    """
    m, weight, density, z = scales(f, block_size, 0.01)
    mean = float(np.sum(weight * m))
    terms = _terms_in_d(f, block_size, book, ends, m)
    s, chance = _largest_of_group(m, z, mean)
    table = absmax_map(torch.device("cpu")).double().numpy()
    middles = (table[1:] + table[:-1]) / 2
    distance, d = np.abs(m - mean), m - mean
    n, found = ABSMAX_BLOCK_SIZE, {1: 0.0, 2: 0.0}
    for largest, p in zip(s, chance, strict=True):
        near = distance <= largest
        if not near.any():
            continue
        rounding = table[np.searchsorted(middles, d[near] / largest)] * largest - d[near]
        share = weight[near] / weight[near].sum()
        lowest = (1 + table[0]) * largest
        below, above = np.interp([mean - largest, mean + largest], m, density, left=0, right=0)
        negative = below / (below + above) if below > 0 else 0.0
        for power, (linear, square, kink) in terms.items():
            others = linear[near] * rounding + square[near] * rounding**2
            others = np.sum(share * (others + kink * np.abs(rounding)))
            at = [float(np.interp(mean - largest, m, term)) for term in (linear, square)]
            itself = at[0] * lowest + at[1] * lowest**2 + kink * lowest
            found[power] += p * ((n - 1) / n * others + negative * itself / n)
    return found


def _largest_of_group(m: Array, z: Array, mean: float) -> tuple[Array, Array]:
    """Return values of the largest |M - mean| of 256 blocks, and their weights in a sum.

    Args:
        m: values of M, ascending.
        z: log(G / (1 - G)) at m.
        mean: of M.
    """
    u = np.arange(-14.0, 60.0, 0.2)
    tail = -np.expm1(-np.log1p(np.exp(-u)) / ABSMAX_BLOCK_SIZE)  # of one block
    s = np.geomspace(1e-4, m[-1] - mean, 40_000)
    above = special.expit(-np.interp(mean + s, m, z))
    below = np.where(mean - s > m[0], special.expit(np.interp(mean - s, m, z)), 0.0)
    found = np.exp(np.interp(-np.log(tail), -np.log(above + below), np.log(s)))
    weight = special.expit(u) * special.expit(-u)
    return found, weight / weight.sum()


def _terms_in_d(
    f: Distribution, block_size: int, book: Array, ends: list[float], m: Array
) -> dict[int, tuple[Array, Array, float]]:
    """Return what a small d adds to an error, for each m: a d + b d^2 + c |d|.

    Squares are exact: (x - (m + d) q)^2 = (x - m q)^2 - 2 d q (x - m q) + d^2 q^2. The mean of
    |x - (m + d) q| is taken to the second order; the value of largest magnitude, where it lies
    on a level, adds |d q| itself.
    """
    coarse = m[:: max(len(m) // 1500, 1)]
    edges, level = cells(book)[:, None] * coarse, book[:, None] * coarse
    total = f.moment(0, coarse) - f.moment(0, -coarse)
    zero, one = (np.diff(f.moment(p, edges), axis=0) for p in (0, 1))
    q = book[:, None]
    middle = f.moment(0, np.clip(level, edges[:-1], edges[1:]))
    sign = f.moment(0, edges[1:]) + f.moment(0, edges[:-1]) - 2 * middle
    inner = (level > edges[:-1]) & (level < edges[1:])
    others = (block_size - 1) / block_size / total
    sums = {
        2: (-2 * (q * (one - level * zero)).sum(axis=0), (q**2 * zero).sum(axis=0)),
        1: (-(q * sign).sum(axis=0), (q**2 * f.density(level) * inner).sum(axis=0)),
    }
    found = {}
    for power, (linear, square) in sums.items():
        linear, square, kink = linear * others, square * others, 0.0
        for end in ends:
            nearest = float(book[np.argmin(np.abs(book - end))])
            gap, share = end - nearest, 1 / (block_size * len(ends))
            if power == 2:
                linear = linear - 2 * share * nearest * gap * coarse
                square = square + share * nearest**2
            elif gap:
                linear = linear - share * math.copysign(nearest, gap)
            else:
                kink += share * abs(nearest)
        found[power] = (np.interp(m, coarse, linear), np.interp(m, coarse, square), kink)
    return found
