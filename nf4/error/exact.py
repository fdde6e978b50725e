"""Products with a quantized weight, and their gradients, in float64, and how far off they may be.

What each limit allows is what the references and kernels say they round: W to the dtype of x, or
its levels where scales meet the sums, or W + s B A where an adapter is merged; t, u and the
adapter's term to the dtype of x; sums in fp32; the result once. Where there are several ways to
compute, the limit is that of the one with the largest error: which of them runs is not asked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nf4.codebook import nf4_levels
from nf4.error.roundoff import Exact, Roundoff, rounding, summing
from nf4.functional import dequantize, to_rows
from nf4.reference.dropout_mask import drop, dropout_mask
from nf4.reference.linear import accumulator
from nf4.tensor import NF4Tensor
from nf4.tools.terms import Dropout

# Mean square errors, and what they are multiplied by on their way, as `Roundoff.add` takes them
Source = tuple[Tensor, Tensor | None]


def product(
    left: Tensor,
    right: Tensor,
    dtype: torch.dtype,
    of: torch.dtype,
    plus: Tensor | None = None,
    keep: Tensor | None = None,
) -> Exact:
    """Return keep * (left @ right) + plus.

    Args:
        left: floating ``[M, K]``.
        right: floating ``[K, N]``.
        dtype: what the result is rounded to.
        of: dtype of the factors as they are multiplied; tensor cores may take those of 16 bits.
        plus: floating, what is added before the rounding.
        keep: bool ``[M, N]``, which elements of the product count.
    """
    left, right = left.double(), right.double()
    value, sums = left @ right, summed(left, right, of)
    if keep is not None:
        value, sums = value * keep, sums * keep
    if plus is not None:
        value = value + plus.double()
    return _exact(value, [(sums, None), (rounding(value, dtype), None)])


def column_sums(z: Tensor, dtype: torch.dtype, of: torch.dtype) -> Exact:
    """Return the sums of the columns of z ``[M, N]``; the rest as for `product`."""
    found = product(z.new_ones(1, len(z)), z, dtype, of)
    return Exact(found.value[0], found.limit)


def summed(left: Tensor, right: Tensor, of: torch.dtype) -> Tensor:
    """Return the mean square errors of the sums of left @ right, float64, of factors of a dtype."""
    squares, cut = left.square() @ right.square(), of.itemsize == 2
    return summing(squares, left @ right, left.shape[-1], accumulator(of), cut)


def _exact(
    value: Tensor, common: Sequence[Source], ways: Iterable[Sequence[Source]] = ((),)
) -> Exact:
    limits = []
    for way in ways:
        roundoff = Roundoff()
        for squares, through in (*common, *way):
            roundoff.add(squares, through)
        limits.append(roundoff.limit)
    return Exact(value, max(limits))


def weight_errors(q: NF4Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the square errors ``[N, K]`` of W rounded to a dtype, and of W with rounded levels."""
    q = to_rows(q)
    w = dequantize(q, torch.float64)
    levels = nf4_levels(w.device).double()
    found = [rounding(w, dtype)]
    rounded = levels.to(dtype).double()
    if not torch.equal(rounded, levels):
        pairs = torch.stack([q.packed >> 4, q.packed & 15], dim=-1).view(-1)
        codes = pairs[: w.numel()].view(w.shape).int()
        relative = torch.where(levels == 0, 0, rounded / levels - 1)
        found.append((w * relative[codes]).square())
    return found


def linear(
    x: Tensor,
    q: NF4Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    low: tuple[Tensor, Tensor] | None = None,
    rounded_before: bool = False,
) -> Exact:
    """Return factor * (x @ W.T + t @ b + bias).

    Args:
        x: floating ``[M, K]``.
        q: W ``[N, K]``.
        bias: floating ``[N]`` or None.
        factor: floating ``[N]`` or None.
        low: t ``[M, r]`` and b ``[r, N]``, as they are multiplied.
        rounded_before: whether the sum may be rounded before it meets the factor too.
    """
    dtype, wide, w = x.dtype, x.double(), dequantize(q, torch.float64).T
    value, sums = wide @ w, summed(wide, w, dtype)
    if low is not None:
        t, b = (m.double() for m in low)
        value, sums = value + t @ b, sums + summed(t, b, dtype)
    if bias is not None:
        value = value + bias.double()
    errors = weight_errors(q, dtype)
    common: list[Source] = []
    if factor is not None:
        before, factor = value, factor.double()
        value, sums = before * factor, sums * factor.square()
        errors = [e * factor.square()[:, None] for e in errors]
        if rounded_before:
            common = [(rounding(before, dtype) * factor.square(), None)]
    common += [(sums, None), (rounding(value, dtype), None)]
    return _exact(value, common, ([(e, wide.T)] for e in errors))


def lora_down(x: Tensor, lora_A: Tensor, dropout: Dropout) -> Exact:
    """Return what nf4/reference/lora_down.py does."""
    dropped = drop(x.double(), dropout) / (1 - dropout.p)
    return product(dropped, lora_A.to(x.dtype).T, x.dtype, x.dtype)


def lora_up(
    t: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout: Dropout,
) -> Exact:
    """Return what nf4/reference/lora_up.py does."""
    shape = torch.Size((len(t), b.shape[1]))
    keep = None if dropout.seed is None else dropout_mask(dropout.seed, shape, dropout.p)
    scaled = scaling / (1 - dropout.p) * t.double()
    return product(scaled, b.to(t.dtype), t.dtype, t.dtype, bias, keep)


def lora_grad(
    z: Tensor,
    v: Tensor,
    w: Tensor | None,
    scaling: float,
    need_sums: bool,
    dropout: Dropout,
    transposed: bool = False,
) -> tuple[Exact, Exact | None, Exact | None]:
    """Return what nf4/reference/lora_grad.py does."""
    wide, dtype, sums = z.double(), z.dtype, accumulator(z.dtype)
    scaled = scaling / (1 - dropout.p) * drop(wide, dropout)
    along = None if w is None else product(scaling * wide, w.to(dtype), dtype, dtype)
    added = column_sums(wide, sums, dtype) if need_sums else None
    across = product(v.T, scaled, sums, dtype) if transposed else product(scaled.T, v, sums, dtype)
    return across, along, added


@dataclass(frozen=True, eq=False)
class LoraLinear:
    """y = x @ W.T + s * t @ B.T + bias with t = drop(x) @ A.T / (1 - p), and the gradients of all.

    Attributes:
        x: floating ``[M, K]``.
        q: W ``[N, K]``.
        lora_A: floating ``[r, K]``, rounded to the dtype of x.
        lora_B: floating ``[N, r]``, rounded to the dtype of x.
        scaling: s.
        bias: floating ``[N]`` or None.
        dy: dtype of x ``[M, N]``; None if no gradient is asked for.
        keep: bool ``[M, K]``, which elements dropout keeps; None without dropout.
        dropout_p: p.
    """

    x: Tensor
    q: NF4Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    bias: Tensor | None = None
    dy: Tensor | None = None
    keep: Tensor | None = None
    dropout_p: float = 0.0

    @property
    def _dtype(self) -> torch.dtype:
        return self.x.dtype

    @cached_property
    def _w(self) -> Tensor:
        return dequantize(self.q, torch.float64)

    @cached_property
    def _a(self) -> Tensor:
        return self.lora_A.to(self._dtype).double()

    @cached_property
    def _b(self) -> Tensor:
        return self.scaling * self.lora_B.to(self._dtype).double()

    @cached_property
    def _dropped(self) -> Tensor:
        return self._drop(self.x.double())

    @cached_property
    def _dy(self) -> Tensor:
        if self.dy is None:
            raise ValueError("dy: expected the gradient of y for gradients, got None")
        return self.dy.double()

    def _drop(self, values: Tensor) -> Tensor:
        """Return what dropout makes of float64 values ``[M, K]``."""
        return values if self.keep is None else values * self.keep / (1 - self.dropout_p)

    def _rounded(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return left @ right, and the mean square errors of it rounded to the dtype of x."""
        value = left @ right
        return value, summed(left, right, self._dtype) + rounding(value, self._dtype)

    @cached_property
    def _t(self) -> tuple[Tensor, Tensor]:
        return self._rounded(self._dropped, self._a.T)

    @cached_property
    def _u(self) -> tuple[Tensor, Tensor]:
        return self._rounded(self._dy, self._b)

    @cached_property
    def _weights(self) -> list[Tensor]:
        return weight_errors(self.q, self._dtype)

    @cached_property
    def _merged(self) -> list[Tensor]:
        """The mean square errors of W + s B A rounded once; none where dropout forbids merging."""
        merged = rounding(self._w + self._b @ self._a, self._dtype)
        return [] if self.keep is not None else [merged]

    @cached_property
    def y(self) -> Exact:
        """The output, dtype of x ``[M, N]``."""
        x, (t, t_errors) = self.x.double(), self._t
        bias = 0.0 if self.bias is None else self.bias.double()
        term = t @ self._b.T + bias
        value = x @ self._w.T + term
        sums = summed(x, self._w.T, self._dtype) + summed(t, self._b.T, self._dtype)
        common: list[Source] = [(sums, None), (rounding(value, self._dtype), None)]
        unmerged: list[Source] = [(t_errors, self._b.T), (rounding(term, self._dtype), None)]
        ways = [[(e, x.T), *unmerged] for e in self._weights]
        return _exact(value, common, [*ways, *([(e, x.T)] for e in self._merged)])

    @cached_property
    def dx(self) -> Exact:
        """The gradient of x, dtype of x ``[M, K]``."""
        u, u_errors = self._u
        through = self._a if self.keep is None else self._a / (1 - self.dropout_p)
        term = self._drop(u @ self._a)
        value = self._dy @ self._w + term
        sums = summed(self._dy, self._w, self._dtype) + summed(u, through, self._dtype)
        common: list[Source] = [(sums, None), (rounding(value, self._dtype), None)]
        unmerged: list[Source] = [(u_errors, through), (rounding(term, self._dtype), None)]
        ways = [[(e.T, self._dy.T), *unmerged] for e in self._weights]
        return _exact(value, common, [*ways, *([(e.T, self._dy.T)] for e in self._merged)])

    @cached_property
    def dbias(self) -> Exact:
        """The gradient of the bias, in its dtype ``[N]``."""
        assert self.bias is not None
        return column_sums(self._dy, self.bias.dtype, self._dtype)

    @cached_property
    def dA(self) -> Exact:
        """The gradient of lora_A, in its dtype ``[r, K]``."""
        return self._across(*self._u, self._dropped, self.lora_A.dtype)

    @cached_property
    def dB(self) -> Exact:
        """The gradient of lora_B, in its dtype ``[N, r]``."""
        found = self._across(*self._t, self.scaling * self._dy, self.lora_B.dtype)
        return Exact(found.value.T, found.limit)

    def _across(self, t: Tensor, errors: Tensor, z: Tensor, dtype: torch.dtype) -> Exact:
        """Return t.T @ z, t being rounded."""
        value = t.T @ z
        sources = [
            (errors.T, z),
            (summed(t.T, z, self._dtype), None),
            (rounding(value, dtype), None),
        ]
        return _exact(value, sources)
