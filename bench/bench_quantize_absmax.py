"""Double quantization of the scales alone, those of a weight in blocks of 64, and a copy.

python bench/bench_quantize_absmax.py --help
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from nf4.bench.harness import cases
from nf4.bench.harness.measure import Function
from nf4.reference import quantize_absmax as reference

TITLE = "quantize_absmax"
DEFAULTS = cases.Options(shapes=[(1024, 1024), (4096, 4096)], dtypes=["fp32"])
ON_GPU = replace(DEFAULTS, shapes=[*DEFAULTS.shapes, (28672, 8192)])


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases; scales are float32 whatever the weight's dtype."""
    run = torch.ops.nf4.quantize_absmax
    for weight in options.weights():
        n, k = weight.shape
        absmax = torch.rand(-(-n * k // 64), device=options.device) + 0.5
        for ours, expected in zip(run(absmax), reference.quantize_absmax(absmax), strict=True):
            cases.check_equal(ours, expected, "quantize_absmax")
        moved = 9 * absmax.numel()  # read twice, for the mean comes first
        functions: dict[str, Function] = {"nf4": partial(run, absmax)}
        functions["copy"] = cases.copy_of(moved, options.device)
        yield cases.Case(weight.labels, functions, moved)


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "quantize_absmax", *sys.argv[1:]]))
