"""What the benchmarks of the adapter's three passes share: sizes, and whether dropout is on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cases
import torch
from torch import Tensor

ROWS = [2048, 16384] if cases.GPU else [64]
SHAPES = [(4096, 4096), (14336, 4096)] if cases.GPU else [(512, 512)]
DEFAULTS = cases.Options(shapes=SHAPES, rows=ROWS, ranks=[16, 64])
DROPOUT = 0.05


@dataclass
class Pass:
    """Sizes and tensors of one pass.

    Attributes:
        x: ``[M, K]``.
        dy: ``[M, N]``.
        t: ``[M, r]``.
        lora_A: float32 ``[r, K]``.
        lora_B: float32 ``[N, r]``.
        dropout: arguments dropout_p and seed.
    """

    x: Tensor
    dy: Tensor
    t: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dropout: tuple[float, Tensor | None]


def main(op: str, case: Callable[["Pass", dict[str, str]], cases.Case]) -> None:
    """Time a pass over every size."""
    cases.main(op + cases.STAND_IN, lambda options: _make(options, case), DEFAULTS)


def _make(
    options: cases.Options, case: Callable[[Pass, dict[str, str]], cases.Case]
) -> Iterator[cases.Case]:
    """Yield what `case` makes of each size, without and with dropout."""
    seed = torch.tensor(1, device=cases.DEVICE)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=cases.DEVICE)

    for (n, k), dtype, labels in options.weights():
        for m in options.rows:
            x, dy = random(m, k, dtype=dtype), random(m, n, dtype=dtype)
            for r in options.ranks:
                for p in (0.0, DROPOUT):
                    t = random(m, r, dtype=dtype)
                    sizes = {**labels, "M": str(m), "r": str(r), "dropout": str(p)}
                    dropout = (p, seed if p else None)
                    yield case(Pass(x, dy, t, random(r, k), random(n, r), dropout), sizes)


def check(ours: Tensor, reference: Tensor, what: str) -> None:
    """Raise unless a result is the reference's up to the order of its sums."""
    error = (ours.double() - reference.double()).norm() / reference.double().norm()
    # A rounding to 16 bits that falls the other way, here and there: far below 2**-9 in the mean
    if not error <= 2**-9:
        raise ValueError(f"{what}: expected the reference's result, got {error:.3g} off; not timed")
