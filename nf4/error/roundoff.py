"""How far rounding may take a sum of products from the exact one: limits for checks, derived.

A result is right if it is the exact one but for the roundings that its definition allows. A
rounding to nearest is off by a number between minus and plus half a step of what is rounded.
Roundings are taken as independent and uniform there, each of mean square step^2 / 12, and the error
E of a result is linear in them. Its norm is then at most that of a Gaussian of the same covariance:
with S the covariance of E's elements

    |E|^2 <= tr S + 2 sqrt(tr S^2 t) + 2 |S| t      but with probability exp(-t)

`Roundoff` adds up these three numbers, source by source. What counts is how many roundings a
result is made of, and not how a library happens to add up on the machine at hand: a limit made of a
peer's error is noise where that is the error of a few roundings.

Sources: Hsu, Kakade and Zhang 2012, theorem 2.1 (https://doi.org/10.1214/ECP.v17-2079); Higham and
Mary 2019, model 2.1 of independent roundings (https://doi.org/10.1137/18M1226312).
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

CHANCE = 1e-9  # that a right result is beyond its limit
_T = -math.log(CHANCE)
_MOST_OF_GRAM = 1024  # rows of a Gram matrix worth computing
# Beside a sum's own roundings: those of scaling it, of dividing it by 1 - p, of adding what is next
_AFTER_THE_SUM = 3


class Roundoff:
    """The error that independent roundings add up to, in the Frobenius norm of one result."""

    def __init__(self) -> None:
        self._trace = self._root = self._norm = 0.0  # tr S, sqrt(tr S^2), |S|, or more

    def add(self, squares: Tensor, through: Tensor | None = None) -> Self:
        """Add errors that are independent of those before.

        Args:
            squares: float64 ``[..., P]``, the mean square of each, independent of each other.
            through: float64 ``[P, Q]``, what the errors are multiplied by on their way into the
                result, from the right; None if they are the result's own.

        Returns:
            This object.
        """
        if not squares.numel():
            return self
        squares = squares.double().reshape(-1, squares.shape[-1] if squares.ndim else 1)
        if through is None:
            traces = norms = squares.reshape(-1)
        elif len(through) <= _MOST_OF_GRAM:
            gram = through.double() @ through.double().T
            traces = squares @ gram.diagonal()
            norms = ((squares @ gram.square()) * squares).sum(dim=1).clamp_min(0).sqrt()
        else:  # at most: as if the errors of a row of the result went all one way
            traces = norms = squares @ through.double().square().sum(dim=1)
        self._trace += float(traces.sum())
        self._root += float(norms.norm())
        self._norm += float(norms.max())
        return self

    @property
    def limit(self) -> float:
        """What the norm of the error of a right result is at most, but with `CHANCE`."""
        return math.sqrt(self._trace + 2 * self._root * math.sqrt(_T) + 2 * self._norm * _T)


@dataclass(frozen=True, eq=False)
class Exact:
    """An exact result, and how far from it a computed one may be.

    Attributes:
        value: float64.
        limit: the most that the norm of the difference may be, see `Roundoff`.
    """

    value: Tensor
    limit: float

    def share(self, found: Tensor) -> float:
        """Return the error of a result over its limit: right up to 1; NaN if it has one."""
        difference = float((found.detach().to(self.value.device).double() - self.value).norm())
        return difference / self.limit if difference else 0.0

    @property
    def relative_limit(self) -> float:
        """The limit over the norm of the exact result; infinite where that is zero."""
        norm = float(self.value.norm())
        return self.limit / norm if norm else math.inf


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean square error of rounding float64 values to a dtype: step^2 / 12."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.double())
    # 2^(exponent - 1) <= |value|, and below the least normal number steps become no smaller
    least = math.frexp(info.smallest_normal)[1]
    half = torch.where(values == 0, 0.0, info.eps / 2).double()
    return torch.ldexp(half, exponent.clamp_min(least)).square() / 12


def summing(
    squares: Tensor, total: Tensor, terms: int, dtype: torch.dtype, cut: bool = False
) -> Tensor:
    """Return the mean square error of adding up terms in a dtype, one after another.

    In random order the first j of K terms sum to s_j with a mean square that adds up, over j, to
    R = K (P / 6 + T^2 / 3). Each addition is off by up to u of s_j, mean square u^2 s_j^2 / 3, and
    so is each product. Sums by halves, in blocks or of fused products are off by less.

    A tensor core cuts sums of 8 products and more off instead of rounding them: by u |s_j| in the
    mean, always towards zero. Over J = K / 8 of them that is at most u sqrt(J (R / 8)).

    Args:
        squares: float64, P, the sum of the squares of the terms, of each result.
        total: float64, T, the sum of the terms.
        terms: K.
        dtype: that sums are taken in.
        cut: whether tensor cores may take the sum.

    Source of the cutting: Fasi et al. 2021, section 4 (https://doi.org/10.7717/peerj-cs.330).
    """
    unit = torch.finfo(dtype).eps / 2
    partial = terms * (squares / 6 + total.square() / 3)
    after = _AFTER_THE_SUM * total.square()
    rounded = unit**2 / 3 * (partial + squares + after)
    return rounded + unit**2 * terms / 64 * partial if cut else rounded
