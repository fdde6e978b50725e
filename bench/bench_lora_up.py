"""The output side of an adapter, drop(s * t @ B.T): nf4, PyTorch, a copy.

python bench/bench_lora_up.py --help
"""

import sys
from collections.abc import Iterator

import torch

from nf4.bench.harness import adapters, cases
from nf4.error import exact

TITLE = "lora_up"
DEFAULTS, ON_GPU = adapters.DEFAULTS, adapters.ON_GPU


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    return adapters.make(options, case)


def case(p: adapters.Pass, labels: dict[str, str]) -> cases.Case:
    """Return what to time on one size."""
    device = p.dy.device
    run = cases.kernel("lora_up", device)
    args = (p.t, p.lora_B.T, 2.0, None, p.dropout)
    cases.check_right(run(*args), exact.lora_up(*args), "lora_up")
    (m, n), r = p.dy.shape, p.t.shape[1]
    moved = p.dy.nbytes + p.lora_B.nbytes + p.t.nbytes

    def torch_() -> torch.Tensor:
        y = (p.t @ p.lora_B.to(p.t.dtype).T).mul_(2.0)
        return torch.nn.functional.dropout(y, p.dropout.p) if p.dropout.p else y

    functions = {cases.kernel_name(device): lambda: run(*args), "PyTorch": torch_}
    functions["copy"] = cases.copy_of(moved, device)
    return cases.Case(labels, functions, moved, 2.0 * m * n * r, p.name)


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "lora_up", *sys.argv[1:]]))
