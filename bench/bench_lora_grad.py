"""The adapter's backward in one pass over dy: u = s * dy @ B, dB = s * dy.T @ t; with dropout dA.

python bench/bench_lora_grad.py --help
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from nf4.bench.harness import adapters, cases
from nf4.error import exact

TITLE = "lora_grad"
DEFAULTS, ON_GPU = adapters.DEFAULTS, adapters.ON_GPU


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    return adapters.make(options, case)


def case(p: adapters.Pass, labels: dict[str, str]) -> cases.Case:
    """Return what to time on one size."""
    device = p.dy.device
    run = cases.kernel("lora_grad", device)
    dropped = p.dropout.seed is not None
    z, w = (p.x, None) if dropped else (p.dy, p.lora_B)
    args = (z, p.t, w, 2.0, False, p.dropout)
    for ours, right in zip(run(*args), exact.lora_grad(*args), strict=True):
        if right is not None:
            cases.check_right(ours, right, "lora_grad")
    (m, columns), r = z.shape, p.t.shape[1]
    products = 1 if dropped else 2
    moved = z.nbytes + products * (p.t.nbytes + 4 * columns * r)

    def torch_() -> Any:
        x = torch.nn.functional.dropout(z, p.dropout.p) if dropped else z
        across = x.T @ p.t
        return across if w is None else (across, z @ w.to(z.dtype))

    functions = {cases.kernel_name(device): lambda: run(*args), "PyTorch": torch_}
    functions["copy"] = cases.copy_of(moved, device)
    return cases.Case(labels, functions, moved, 2.0 * products * m * columns * r, p.name)


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "lora_grad", *sys.argv[1:]]))
