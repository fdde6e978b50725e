"""Small things that several tests need."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nf4
from nf4.error import exact
from nf4.tools.terms import Epilogue


def lazy_zeros(n: int, dtype: torch.dtype) -> Tensor:
    """Return zeros whose memory is taken only where it is written."""
    return torch.from_numpy(np.zeros(n * dtype.itemsize, np.uint8)).view(dtype)


def error(found: Tensor, exact: Tensor) -> float:
    """Return the relative error of a tensor, in the Frobenius norm."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def on_gpus(cases: dict) -> list[tuple]:
    """Return (name of a case, GPU): all cases for sm_90, the first two for sm_80 too."""
    return [*((name, "sm_90") for name in cases), *((name, "sm_80") for name in list(cases)[:2])]


def to(value: Any, device: torch.device) -> Any:
    """Return a tensor on a device, a tuple of them likewise, and anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) is tuple:
        return tuple(to(v, device) for v in value)
    return type(value)(*(to(v, device) for v in value)) if hasattr(value, "_fields") else value


@dataclass
class Product:
    """A product of x by a weight in fragments, with an adapter, and what it should be.

    y = factor * (x @ W.T + scaling * t @ lora_B.T + bias)
    """

    x: Tensor
    q: nf4.NF4Tensor  # in rows
    bias: Tensor | None
    t: Tensor | None
    lora_B: Tensor | None
    scaling: float
    factor: Tensor | None = None

    def to(self, device: torch.device) -> "Product":
        """Return the same product on a device."""
        tensors = (self.x, self.q, self.bias, self.t, self.lora_B)
        moved = (None if v is None else v.to(device) for v in tensors)
        factor = None if self.factor is None else self.factor.to(device)
        return Product(*moved, self.scaling, factor)

    def arguments(self) -> tuple:
        """Return the arguments of `matmul`, `matmul_small` and `matmul_row`."""
        epilogue = Epilogue(self.bias, self.t, self.lora_B, self.scaling, self.factor)
        return self.x, nf4.to_fragments(self.q).as_weight(), epilogue

    def check(self, run: Callable[..., Tensor], reference: Callable[..., Tensor]) -> Tensor:
        """Hold what a kernel returns to its reference and to float64, and return it."""
        args = self.arguments()
        y, expected = run(*args), reference(*args)
        assert y.dtype == expected.dtype and y.shape == expected.shape
        assert self.exact().share(y) <= 1
        # Sums in another order may round to the neighbour: at most one step, and seldom.
        step = 2**-7 if y.dtype == torch.bfloat16 else 2**-10
        torch.testing.assert_close(y, expected, rtol=step, atol=1e-3)
        assert (y != expected).float().mean() < 0.02
        return y

    def exact(self) -> exact.Exact:
        """Return the product in float64, and how far off others may be."""
        low = None
        if self.t is not None:
            low = (self.scaling * self.t.double(), self.lora_B.to(self.x.dtype).T)
        return exact.linear(self.x, self.q, self.bias, self.factor, low)


@dataclass(frozen=True)
class ProductCase:
    """Sizes and forms of a product: x ``[m, k]``, W ``[n, k]``, an adapter of rank r if not 0."""

    m: int
    n: int
    k: int
    block_size: int = 64
    double_quant: bool = True
    dtype: torch.dtype = torch.bfloat16
    r: int = 0
    bias: bool = False
    scaling: float = 2.0
    factor: bool = False

    def make(self) -> Product:
        """Make a random product; the weight has a few outliers, as language models' have."""
        m, n, k, r = self.m, self.n, self.k, self.r
        w = torch.randn(n, k) / k**0.5
        w[torch.rand(n, k) < 1e-3] *= 20
        t = torch.randn(m, r).to(self.dtype) if r else None
        b = torch.randn(n, r) / max(r, 1) ** 0.5 if r else None
        bias = torch.randn(n).to(self.dtype) if self.bias else None
        q = nf4.quantize(w, self.block_size, self.double_quant)
        x = torch.randn(m, k).to(self.dtype)
        return Product(x, q, bias, t, b, self.scaling, torch.randn(n) if self.factor else None)
