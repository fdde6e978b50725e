"""What all benchmarks share: a case to time, the options of one, and the check before timing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nf4.bench.harness.asked import DTYPES as NAMES
from nf4.bench.harness.measure import Function
from nf4.error.roundoff import Exact

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # unless another is asked for
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, whole) for name, whole in NAMES.items()}


class MismatchError(ValueError):
    """A result is not the reference's, and is not timed."""


@dataclass
class Case:
    """One size to time.

    Attributes:
        labels: what tells it from the others, such as ``{"W": "4096×4096", "M": "16"}``.
        functions: what to time, by name; the first is ours, and every name of ours begins "nf4".
        moved: bytes that must be read and written.
        flops: operations that must be done.
        dtype: name of the dtype whose products limit the operations, a key of `DTYPES`.
        expected: float64, the first rows of what each function but a copy returns, within what
            another 4-bit format may differ; None where functions return no tensor.
    """

    labels: dict[str, str]
    functions: dict[str, Function]
    moved: float
    flops: float = 0.0
    dtype: str = "fp32"
    expected: Tensor | None = None


@dataclass(frozen=True)
class Weight:
    """One weight to quantize: all its cases follow from it.

    Attributes:
        shape: N and K.
        dtype: of the weight.
        name: of the dtype, a key of `DTYPES`.
        rows: of x, each M.
        labels: of the cases.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    name: str
    rows: Sequence[int]
    labels: dict[str, str]


@dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
        shapes: of W, ``(N, K)``.
        rows: of x, M.
        ranks: of the adapter.
        dtypes: names of `DTYPES`.
        device: where.
        rows_of: rows of x for some of the shapes, in place of `rows`.
        rounds: calls of each function; None for 20, or fewer where they are slow.
    """

    shapes: Sequence[tuple[int, int]] = ((1024, 1024),)
    rows: Sequence[int] = (1,)
    ranks: Sequence[int] = (16,)
    dtypes: Sequence[str] = ("bf16",)
    device: torch.device = DEVICE
    rows_of: dict[tuple[int, int], Sequence[int]] = field(default_factory=dict)
    rounds: int | None = None

    def weights(self) -> Iterator[Weight]:
        """Yield each shape and dtype."""
        for shape in self.shapes:
            for name in self.dtypes:
                labels = {"W": f"{shape[0]}×{shape[1]}", "dtype": name}
                rows = self.rows_of.get(shape, self.rows)
                yield Weight(shape, DTYPES[name], name, rows, labels)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return normal values on the device."""
        return torch.randn(shape, dtype=dtype, device=self.device)


def check_equal(ours: Tensor, reference: Tensor, what: str) -> None:
    """Raise unless a result equals the reference's: a wrong result is not timed."""
    if not torch.equal(ours, reference):
        raise MismatchError(f"{what}: expected the reference's result, got another; not timed")


def check_right(found: Tensor, exact: Exact, what: str) -> None:
    """Raise if a result is further from the exact one than its roundings can take it."""
    share = exact.share(found)
    if not share <= 1:
        limit = exact.relative_limit
        message = f"a relative error of at most {limit:.3g}, got {share * limit:.3g}; not timed"
        raise MismatchError(f"{what}: expected {message}")


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over that of the exact values, float64."""
    return float((found.double() - exact).norm() / exact.norm())


def kernel(op: str, device: torch.device) -> Callable[..., Any]:
    """Return a kernel's launcher, or its reference where there is no GPU."""
    package = "nf4.kernels" if device.type == "cuda" else "nf4.reference"
    found: Callable[..., Any] = getattr(import_module(f"{package}.{op}"), op)
    return found


def kernel_name(device: torch.device) -> str:
    """Return the name under which `kernel` is timed: no reference passes for a kernel."""
    return "nf4" if device.type == "cuda" else "nf4's reference"


def copy_of(moved: float, device: torch.device) -> Function:
    """Return a copy within the device that reads and writes as many bytes together."""
    source = torch.zeros(int(moved) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
