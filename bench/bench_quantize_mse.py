"""Quantize with the scale of least squared error, block 64: nf4, its absmax scale, and a copy.

python bench/bench_quantize_mse.py --help
"""

from collections.abc import Iterator

import cases
import torch

import nf4
from nf4.reference.quantize_mse import quantize_mse as reference

DEFAULTS = cases.Options(
    shapes=[(1024, 1024)] + [(4096, 4096), (14336, 4096)] * cases.GPU,
    dtypes=["bf16"],
)


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    for shape, dtype, labels in options.weights():
        w = torch.randn(shape, dtype=dtype, device=cases.DEVICE)
        q = nf4.quantize(w, scale="mse")
        rows = max(4096 // shape[1], 1)  # of whole blocks: the reference takes its time
        expected = reference(w[:rows], q.block_size, True)[0]
        cases.check_equal(q.packed[:rows].flatten(), expected, "quantize_mse")
        moved = q.nbytes + w.nbytes
        functions = {
            "nf4": lambda w=w: nf4.quantize(w, scale="mse"),
            "nf4, absmax": lambda w=w: nf4.quantize(w),
        }
        yield cases.Case(labels, {**functions, "copy": cases.copy_of(moved)}, moved)


if __name__ == "__main__":
    cases.main("quantize_mse", make, DEFAULTS)
