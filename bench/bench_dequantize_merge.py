"""Dequantize a weight in fragments and add s * B @ A, in one launch and as others would.

python bench/bench_dequantize_merge.py --help
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

import nf4
from nf4.bench.harness import cases
from nf4.bench.harness.measure import Function
from nf4.error.exact import product
from nf4.tools.terms import LowRank

TITLE = "dequantize_merge"
DEFAULTS = cases.Options(shapes=[(1024, 1024)], ranks=[16, 64])
ON_GPU = replace(DEFAULTS, shapes=[*DEFAULTS.shapes, (4096, 4096), (14336, 4096)])


def _unfused(
    q: nf4.NF4Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    w: torch.Tensor = nf4.dequantize(q, dtype)
    return w.addmm_(b.to(dtype), a.to(dtype), alpha=2.0)


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases, one a rank."""
    merge = cases.kernel("dequantize_merge", options.device)
    for weight in options.weights():
        (n, k), dtype = weight.shape, weight.dtype
        w = options.random(n, k, dtype=dtype)
        q = nf4.to_fragments(nf4.quantize(w))
        for r in options.ranks:
            a, b = (options.random(*s) / 8 for s in ((r, k), (n, r)))
            fused = partial(merge, q.as_weight(), LowRank(a, b, 2.0), dtype)
            plus, low = nf4.dequantize(q, torch.float64), (2.0 * b.to(dtype), a.to(dtype))
            cases.check_right(fused(), product(*low, dtype, dtype, plus), "dequantize_merge")
            moved = q.nbytes + w.nbytes + a.nbytes + b.nbytes
            functions: dict[str, Function] = {
                cases.kernel_name(options.device): fused,
                "dequantize, then addmm_": partial(_unfused, q, a, b, dtype),
                "dequantize alone": partial(nf4.dequantize, q, dtype),
                "copy": cases.copy_of(moved, w.device),
            }
            labels = {**weight.labels, "r": str(r)}
            yield cases.Case(labels, functions, moved, 2.0 * n * k * r, weight.name)


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "dequantize_merge", *sys.argv[1:]]))
