"""What the benchmarks of the adapter's three passes share: sizes, and whether dropout is on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nf4.bench.harness import cases
from nf4.tools.terms import Dropout

DEFAULTS = cases.Options(shapes=[(512, 512)], rows=[64], ranks=[16, 64])
ON_GPU = cases.Options(shapes=[(4096, 4096), (14336, 4096)], rows=[2048, 16384], ranks=[16, 64])
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
        dropout: of x.
        name: of the dtype of x, dy and t.
    """

    x: Tensor
    dy: Tensor
    t: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dropout: Dropout
    name: str


def make(
    options: cases.Options, case: Callable[[Pass, dict[str, str]], cases.Case]
) -> Iterator[cases.Case]:
    """Yield what `case` makes of each size, without and with dropout."""
    seed = torch.tensor(1, device=options.device)
    random = options.random
    for weight in options.weights():
        (n, k), dtype = weight.shape, weight.dtype
        for m in weight.rows:
            x, dy = random(m, k, dtype=dtype), random(m, n, dtype=dtype)
            for r in options.ranks:
                for p in (0.0, DROPOUT):
                    t = random(m, r, dtype=dtype)
                    sizes = {**weight.labels, "M": str(m), "r": str(r), "dropout": str(p)}
                    dropout = Dropout(p, seed if p else None)
                    adapter = (random(r, k), random(n, r))
                    yield case(Pass(x, dy, t, *adapter, dropout, weight.name), sizes)
