"""Dequantize with double quantization, block 64: nf4 from rows and from fragments, others, a copy.

python bench/bench_dequantize.py --help
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

import nf4
from nf4.bench.harness import cases, peers
from nf4.bench.harness.measure import Function
from nf4.reference import dequantize as reference
from nf4.tensor import fits_fragments

TITLE = "dequantize"
DEFAULTS = cases.Options(shapes=[(1024, 1024), (4096, 4096)], dtypes=["bf16", "fp32"])
ON_GPU = replace(DEFAULTS, shapes=[*DEFAULTS.shapes, (14336, 4096), (28672, 8192)])


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    for weight in options.weights():
        w = options.random(*weight.shape, dtype=weight.dtype)
        q = nf4.quantize(w)
        expected = reference.dequantize(q.as_weight(), weight.dtype)
        out = torch.full_like(w, torch.nan)
        cases.check_equal(nf4.dequantize(q), expected, "dequantize")
        cases.check_equal(nf4.dequantize(q, out=out), expected, "dequantize, out=")
        functions: dict[str, Function] = {
            "nf4": partial(nf4.dequantize, q),
            "nf4, out=": partial(nf4.dequantize, q, out=out),
        }
        if w.is_cuda and fits_fragments(q.shape, q.block_size) and weight.dtype != torch.float32:
            f = nf4.to_fragments(q)
            cases.check_equal(nf4.dequantize(f), expected, "dequantize of fragments")
            functions["nf4, fragments"] = partial(nf4.dequantize, f)
        moved = q.nbytes + w.nbytes
        functions |= {**peers.dequantizers(w), "copy": cases.copy_of(moved, w.device)}
        yield cases.Case(weight.labels, functions, moved, expected=expected.double())


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "dequantize", *sys.argv[1:]]))
