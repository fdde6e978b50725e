"""The output side of an adapter, drop(s * t @ B.T): nf4, PyTorch, a copy.

python bench/bench_lora_up.py --help
"""

import adapters
import cases
import torch

from nf4.reference.lora_up import lora_up as reference


def case(p: adapters.Pass, labels: dict[str, str]) -> cases.Case:
    """Return what to time on one size."""
    run = cases.kernel("lora_up")
    args = (p.t, p.lora_B.T, 2.0, None, *p.dropout)
    adapters.check(run(*args), reference(*args), "lora_up")
    (m, n), r = p.dy.shape, p.t.shape[1]
    moved = p.dy.nbytes + p.lora_B.nbytes + p.t.nbytes

    def torch_() -> torch.Tensor:
        y = (p.t @ p.lora_B.to(p.t.dtype).T).mul_(2.0)
        return torch.nn.functional.dropout(y, p.dropout[0]) if p.dropout[0] else y

    functions = {"nf4": lambda: run(*args), "PyTorch": torch_, "copy": cases.copy_of(moved)}
    return cases.Case(labels, functions, moved, 2.0 * m * n * r)


if __name__ == "__main__":
    adapters.main("lora_up", case)
