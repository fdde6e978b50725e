"""Dequantize with double quantization, block 64: nf4 from rows and from fragments, others, a copy.

python bench/bench_dequantize.py --help
"""

from collections.abc import Iterator

import cases
import peers
import torch

import nf4
from nf4.reference import dequantize as reference
from nf4.tensor import fits_fragments

DEFAULTS = cases.Options(
    shapes=[(1024, 1024), (4096, 4096)] + [(14336, 4096), (28672, 8192)] * cases.GPU,
    dtypes=["bf16", "fp32"],
)


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    for shape, dtype, labels in options.weights():
        w = torch.randn(shape, dtype=dtype, device=cases.DEVICE)
        q = nf4.quantize(w)
        parts = q.parts()
        expected = reference.dequantize(*parts, shape, q.block_size, dtype)
        cases.check_equal(nf4.dequantize(q), expected, "dequantize")
        moved = q.nbytes + w.nbytes
        functions = {"nf4": lambda q=q: nf4.dequantize(q)}
        if fits_fragments(q.shape, q.block_size) and dtype != torch.float32:
            f = nf4.to_fragments(q)
            cases.check_equal(nf4.dequantize(f), expected, "dequantize of fragments")
            functions["nf4, fragments"] = lambda f=f: nf4.dequantize(f)
        functions |= peers.dequantizers(w)
        yield cases.Case(labels, {**functions, "copy": cases.copy_of(moved)}, moved)


if __name__ == "__main__":
    cases.main("dequantize", make, DEFAULTS)
