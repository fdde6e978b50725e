"""Multiply one or two rows by three weights, as a query, a key and a value: together, and each.

python bench/bench_row_group.py --help
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch

import nf4
from nf4.bench.harness import cases
from nf4.bench.harness.measure import Function
from nf4.error import exact
from nf4.tensor import fits_fragments
from nf4.tools.cost import weight_bytes

TITLE = "linear, one or two rows of three weights"
DEFAULTS = cases.Options(shapes=[(1024, 1024)], rows=[1], dtypes=["bf16", "fp32"])
ON_GPU = cases.Options(shapes=[(1024, 4096), (4096, 4096)], rows=[1, 2])
MEMBERS = 3


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield a case for each weight and number of rows."""
    for weight in options.weights():
        (n, k), dtype = weight.shape, weight.dtype
        dense = options.random(MEMBERS * n, k, dtype=dtype) / k**0.5
        weights = [nf4.quantize(part) for part in dense.chunk(MEMBERS)]
        if dense.is_cuda and fits_fragments(weights[0].shape, weights[0].block_size):
            weights = [nf4.to_fragments(q) for q in weights]
        for m in weight.rows:
            x = options.random(m, k, dtype=dtype)
            functions = _ours(x, weights)
            for name, function in functions.items():
                for q, y in zip(weights, function(), strict=True):
                    cases.check_right(y, exact.linear(x, q), f"row_group, {name}")
            functions["PyTorch, dense, in one"] = partial(torch.nn.functional.linear, x, dense)
            moved = MEMBERS * weight_bytes(n, k) + x.itemsize * m * (MEMBERS * n + k)
            labels = {**weight.labels, "M": str(m)}
            yield cases.Case(labels, functions, moved, 2.0 * MEMBERS * m * n * k, weight.name)


def _ours(x: torch.Tensor, weights: list[nf4.NF4Tensor]) -> dict[str, Function]:
    """Return a launch for each weight, and one for all where there is a kernel."""
    functions: dict[str, Function] = {"nf4, each": lambda: [nf4.linear(x, q) for q in weights]}
    if {nf4.explain(x.shape, q, x.dtype).kernel for q in weights} == {"matmul_row"}:
        run, held = cases.kernel("row_group", x.device), [q.as_weight() for q in weights]
        functions["nf4, row_group"] = lambda: run(x, held, [None] * len(held))
    return functions


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "row_group", *sys.argv[1:]]))
