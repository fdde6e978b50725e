"""The input side of an adapter, t = drop(x) @ A.T: nf4, two calls of PyTorch, a copy.

python bench/bench_lora_down.py --help
"""

import adapters
import cases
import torch

from nf4.reference.lora_down import lora_down as reference


def case(p: adapters.Pass, labels: dict[str, str]) -> cases.Case:
    """Return what to time on one size."""
    run = cases.kernel("lora_down")
    args = (p.x, p.lora_A, *p.dropout)
    adapters.check(run(*args), reference(*args), "lora_down")
    (m, k), r = p.x.shape, p.lora_A.shape[0]
    moved = p.x.nbytes + p.lora_A.nbytes + p.t.nbytes

    def torch_() -> torch.Tensor:
        x = torch.nn.functional.dropout(p.x, p.dropout[0]) if p.dropout[0] else p.x
        return x @ p.lora_A.to(x.dtype).T

    functions = {"nf4": lambda: run(*args), "PyTorch": torch_, "copy": cases.copy_of(moved)}
    return cases.Case(labels, functions, moved, 2.0 * m * k * r)


if __name__ == "__main__":
    adapters.main("lora_down", case)
