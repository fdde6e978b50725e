"""The adapter's backward in one pass over dy: u = s * dy @ B, dB = s * dy.T @ t; with dropout dA.

python bench/bench_lora_grad.py --help
"""

from typing import Any

import adapters
import cases
import torch

from nf4.reference.lora_grad import lora_grad as reference


def case(p: adapters.Pass, labels: dict[str, str]) -> cases.Case:
    """Return what to time on one size."""
    run = cases.kernel("lora_grad")
    dropped = p.dropout[1] is not None
    z, w = (p.x, None) if dropped else (p.dy, p.lora_B)
    args = (z, p.t, w, 2.0, False, *p.dropout)
    for ours, expected in zip(run(*args), reference(*args), strict=True):
        if expected is not None:
            adapters.check(ours, expected, "lora_grad")
    (m, columns), r = z.shape, p.t.shape[1]
    products = 1 if dropped else 2
    moved = z.nbytes + products * (p.t.nbytes + 4 * columns * r)

    def torch_() -> Any:
        x = torch.nn.functional.dropout(z, p.dropout[0]) if dropped else z
        across = x.T @ p.t
        return across if w is None else (across, z @ w.to(z.dtype))

    functions = {"nf4": lambda: run(*args), "PyTorch": torch_, "copy": cases.copy_of(moved)}
    return cases.Case(labels, functions, moved, 2.0 * products * m * columns * r)


if __name__ == "__main__":
    adapters.main("lora_grad", case)
