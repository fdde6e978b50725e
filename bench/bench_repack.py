"""Repack a weight between rows and fragments, and a copy of the same bytes.

python bench/bench_repack.py --help
"""

from collections.abc import Iterator

import cases
import torch

import nf4
from nf4.reference import repack as reference

DEFAULTS = cases.Options(shapes=[(1024, 1024), (4096, 4096)] + [(14336, 4096)] * cases.GPU)


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases, one a direction."""
    for shape, dtype, labels in options.weights():
        rows = nf4.quantize(torch.randn(shape, dtype=dtype, device=cases.DEVICE))
        fragments = nf4.to_fragments(rows)
        expected = reference.repack(rows.packed, rows.absmax, *shape, "fragments")[0]
        cases.check_equal(fragments.packed, expected, "repack")
        cases.check_equal(nf4.to_rows(fragments).packed, rows.packed, "repack")
        moved = 2 * rows.nbytes
        for name, run, q in (
            ("to fragments", nf4.to_fragments, rows),
            ("to rows", nf4.to_rows, fragments),
        ):
            functions = {"nf4": lambda run=run, q=q: run(q), "copy": cases.copy_of(moved)}
            yield cases.Case({**labels, "direction": name}, functions, moved)


if __name__ == "__main__":
    cases.main("repack", make, DEFAULTS)
