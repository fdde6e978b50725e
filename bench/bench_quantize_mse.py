"""Quantize with the scale of least squared error, block 64: nf4, its absmax scale, and a copy.

python bench/bench_quantize_mse.py --help
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import nf4
from nf4.bench.harness import cases
from nf4.bench.harness.measure import Function
from nf4.reference.quantize_mse import quantize_mse as reference

TITLE = "quantize_mse"
DEFAULTS = cases.Options(shapes=[(1024, 1024)])
ON_GPU = replace(DEFAULTS, shapes=[*DEFAULTS.shapes, (4096, 4096), (14336, 4096)])


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    for weight in options.weights():
        w = options.random(*weight.shape, dtype=weight.dtype)
        q = nf4.quantize(w, scale="mse")
        rows = max(4096 // weight.shape[1], 1)  # of whole blocks: the reference takes its time
        expected = reference(w[:rows], q.block_size, True)[0]
        cases.check_equal(q.packed[:rows].flatten(), expected, "quantize_mse")
        moved = q.nbytes + w.nbytes
        functions: dict[str, Function] = {
            "nf4": partial(nf4.quantize, w, scale="mse"),
            "nf4, absmax": partial(nf4.quantize, w),
            "copy": cases.copy_of(moved, w.device),
        }
        yield cases.Case(weight.labels, functions, moved)


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "quantize_mse", *sys.argv[1:]]))
