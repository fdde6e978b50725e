"""Symmetric distributions of variance 1: partial moments, and the largest of a block."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special, stats

from nf4.tools.caches import forgettable

Array = np.ndarray[Any, np.dtype[np.float64]]


class Distribution(ABC):
    """A symmetric distribution of mean 0 and variance 1."""

    heavy_tails = False  # whether they fall off slower than exponentially

    @abstractmethod
    def density(self, x: Array) -> Array:
        """Return f(x)."""

    @abstractmethod
    def moment(self, power: int, x: Array) -> Array:
        """Return the integral of t^power f(t) from -infinity to x; power 0, 1 or 2."""

    @abstractmethod
    def inverse_tail(self, p: Array) -> Array:
        """Return x with P(X > x) = p."""

    @abstractmethod
    def sample(self, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
        """Return independent values."""


@dataclass(frozen=True)
class Normal(Distribution):
    """N(0, 1)."""

    def density(self, x: Array) -> Array:
        """Return f(x)."""
        return np.asarray(np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi))

    def moment(self, power: int, x: Array) -> Array:
        """Return the partial moment."""
        if power == 0:
            return np.asarray(special.ndtr(x))
        first = -self.density(x)
        return first if power == 1 else np.asarray(special.ndtr(x) + x * first)

    def inverse_tail(self, p: Array) -> Array:
        """Return x with P(X > x) = p."""
        return np.asarray(stats.norm.isf(p))

    def sample(self, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
        """Return independent values."""
        return generator.standard_normal(shape)


@dataclass(frozen=True)
class Laplace(Distribution):
    """The double exponential distribution, f(x) = exp(-|x| / b) / 2b with b = 1 / sqrt(2)."""

    b = 1 / math.sqrt(2)

    def density(self, x: Array) -> Array:
        """Return f(x)."""
        return np.asarray(np.exp(-np.abs(x) / self.b) / (2 * self.b))

    def moment(self, power: int, x: Array) -> Array:
        """Return the partial moment, of -|x| first: the density is symmetric."""
        a, tail = np.abs(x), np.exp(-np.abs(x) / self.b) / 2
        if power == 0:
            return np.asarray(np.where(x < 0, tail, 1 - tail))
        if power == 1:
            return np.asarray(-(a + self.b) * tail)
        below = (a**2 + 2 * self.b * a + 2 * self.b**2) * tail
        return np.asarray(np.where(x < 0, below, 1 - below))

    def inverse_tail(self, p: Array) -> Array:
        """Return x with P(X > x) = p, for p up to one half."""
        return np.asarray(-self.b * np.log(2 * p))

    def sample(self, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
        """Return independent values."""
        return generator.laplace(0, self.b, shape)


@dataclass(frozen=True)
class StudentT(Distribution):
    """Student's t with nu > 2 degrees of freedom, scaled to variance 1."""

    nu: float
    heavy_tails = True

    @property
    def unit(self) -> float:
        """Standard deviation before scaling."""
        return math.sqrt(self.nu / (self.nu - 2))

    def density(self, x: Array) -> Array:
        """Return f(x)."""
        return np.asarray(stats.t.pdf(x * self.unit, self.nu) * self.unit)

    def moment(self, power: int, x: Array) -> Array:
        """Return the partial moment.

        t^2 f_nu(t) = nu (1 + t^2 / nu) f_nu(t) - nu f_nu(t), and the first of these is a multiple
        of the density with nu - 2 degrees of freedom.
        """
        t, nu = np.asarray(x) * self.unit, self.nu
        if power == 0:
            return np.asarray(special.stdtr(nu, t))
        if power == 1:
            return np.asarray(-(nu + t**2) / (nu - 1) * stats.t.pdf(t, nu) / self.unit)
        ratio = math.exp(_log_constant(nu) - _log_constant(nu - 2)) * math.sqrt(nu / (nu - 2))
        wide = special.stdtr(nu - 2, t * math.sqrt((nu - 2) / nu))
        return np.asarray(nu * (ratio * wide - special.stdtr(nu, t)) / self.unit**2)

    def inverse_tail(self, p: Array) -> Array:
        """Return x with P(X > x) = p."""
        return np.asarray(stats.t.isf(p, self.nu) / self.unit)

    def sample(self, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
        """Return independent values."""
        return np.asarray(generator.standard_t(self.nu, shape) / self.unit)


def _log_constant(nu: float) -> float:
    """Return the logarithm of what makes the density of Student's t integrate to 1."""
    return float(
        special.gammaln((nu + 1) / 2) - special.gammaln(nu / 2) - math.log(nu * math.pi) / 2
    )


def distribution_of(name: str | Distribution) -> Distribution:
    """Return a distribution by its name: "normal", "laplace" or "student-t:NU".

    Raises:
        ValueError: there is no such distribution.
    """
    if isinstance(name, Distribution):
        return name
    if name == "normal":
        return Normal()
    if name == "laplace":
        return Laplace()
    kind, _, degrees = str(name).partition(":")
    try:
        nu = float(degrees)
    except ValueError:
        nu = math.nan
    if kind != "student-t" or not 2 < nu < math.inf:
        raise ValueError(
            f"distribution: expected normal, laplace or student-t:NU with NU > 2, got {name!r}"
        )
    return StudentT(nu)


@forgettable
@lru_cache(maxsize=64)
def scales(f: Distribution, block_size: int, step: float = 0.05) -> tuple[Array, ...]:
    """Return values m of the scale, their weights in an integral, and their density.

    Args:
        f: distribution of the values.
        block_size: values that share one scale.
        step: of the sum in z.

    Returns:
        m ascending, weights that add up to 1, the density of M at m, and z.
    """
    z = np.arange(-40.0, 40.0 + 60.0 * (f.heavy_tails), step)
    log_g = -np.log1p(np.exp(-z))  # G = 1 / (1 + exp(-z))
    tail = -np.expm1(log_g / block_size)  # P(|x| > m)
    m = f.inverse_tail(tail / 2)
    inside = np.exp(log_g / block_size)
    # dG/dm = B P(|x| <= m)^(B - 1) 2 f(m), and dG/dz = G (1 - G)
    density = block_size * np.exp(log_g * (block_size - 1) / block_size) * 2 * f.density(m)
    weight = np.exp(log_g - np.log1p(np.exp(z))) * step
    keep = (inside > 0) & (m > 0) & np.isfinite(m)
    return m[keep], weight[keep] / weight[keep].sum(), density[keep], z[keep]
