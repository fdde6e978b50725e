"""Quantize with double quantization, block 64: nf4, others and a copy of the same bytes.

python bench/bench_quantize.py --help
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import nf4
from nf4.bench.harness import cases, peers
from nf4.bench.harness.measure import Function
from nf4.reference import quantize as reference

TITLE = "quantize"
DEFAULTS = cases.Options(shapes=[(1024, 1024), (4096, 4096)], dtypes=["bf16", "fp32"])
ON_GPU = replace(DEFAULTS, shapes=[*DEFAULTS.shapes, (14336, 4096), (28672, 8192)])


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    for weight in options.weights():
        w = options.random(*weight.shape, dtype=weight.dtype)
        q = nf4.quantize(w)
        expected = reference.quantize(w, q.block_size)[0]
        cases.check_equal(q.packed.flatten(), expected, "quantize")
        moved = q.nbytes + w.nbytes
        functions: dict[str, Function] = {"nf4": partial(nf4.quantize, w), **peers.quantizers(w)}
        functions["copy"] = cases.copy_of(moved, w.device)
        yield cases.Case(weight.labels, functions, moved)


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "quantize", *sys.argv[1:]]))
