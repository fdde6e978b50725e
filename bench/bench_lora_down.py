"""The input side of an adapter, t = drop(x) @ A.T: nf4, two calls of PyTorch, a copy.

python bench/bench_lora_down.py --help
"""

import sys
from collections.abc import Iterator

import torch

from nf4.bench.harness import adapters, cases
from nf4.error import exact

TITLE = "lora_down"
DEFAULTS, ON_GPU = adapters.DEFAULTS, adapters.ON_GPU


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    return adapters.make(options, case)


def case(p: adapters.Pass, labels: dict[str, str]) -> cases.Case:
    """Return what to time on one size."""
    device = p.x.device
    run = cases.kernel("lora_down", device)
    args = (p.x, p.lora_A, p.dropout)
    cases.check_right(run(*args), exact.lora_down(*args), "lora_down")
    (m, k), r = p.x.shape, p.lora_A.shape[0]
    moved = p.x.nbytes + p.lora_A.nbytes + p.t.nbytes

    def torch_() -> torch.Tensor:
        x = torch.nn.functional.dropout(p.x, p.dropout.p) if p.dropout.p else p.x
        return x @ p.lora_A.to(x.dtype).T

    functions = {cases.kernel_name(device): lambda: run(*args), "PyTorch": torch_}
    functions["copy"] = cases.copy_of(moved, device)
    return cases.Case(labels, functions, moved, 2.0 * m * k * r, p.name)


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "lora_down", *sys.argv[1:]]))
