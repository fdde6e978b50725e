"""Quantize with double quantization, block 64: nf4, others and a copy of the same bytes.

python bench/bench_quantize.py --help
"""

from collections.abc import Iterator

import cases
import peers
import torch

import nf4
from nf4.reference import quantize as reference

DEFAULTS = cases.Options(
    shapes=[(1024, 1024), (4096, 4096)] + [(14336, 4096), (28672, 8192)] * cases.GPU,
    dtypes=["bf16", "fp32"],
)


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    for shape, dtype, labels in options.weights():
        w = torch.randn(shape, dtype=dtype, device=cases.DEVICE)
        q = nf4.quantize(w)
        expected = reference.quantize(w, q.block_size)[0]
        cases.check_equal(q.packed.flatten(), expected, "quantize")
        moved = q.nbytes + w.nbytes
        functions = {"nf4": lambda w=w: nf4.quantize(w), **peers.quantizers(w)}
        yield cases.Case(labels, {**functions, "copy": cases.copy_of(moved)}, moved)


if __name__ == "__main__":
    cases.main("quantize", make, DEFAULTS)
