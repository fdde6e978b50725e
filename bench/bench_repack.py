"""Repack a weight between rows and fragments, and a copy of the same bytes.

python bench/bench_repack.py --help
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import nf4
from nf4.bench.harness import cases
from nf4.bench.harness.measure import Function
from nf4.reference import repack as reference

TITLE = "repack"
DEFAULTS = cases.Options(shapes=[(1024, 1024), (4096, 4096)])
ON_GPU = replace(DEFAULTS, shapes=[*DEFAULTS.shapes, (14336, 4096)])


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases, one a direction."""
    for weight in options.weights():
        rows = nf4.quantize(options.random(*weight.shape, dtype=weight.dtype))
        fragments = nf4.to_fragments(rows)
        expected = reference.repack(rows.as_weight(), "fragments").packed
        cases.check_equal(fragments.packed, expected, "repack")
        cases.check_equal(nf4.to_rows(fragments).packed, rows.packed, "repack")
        moved = 2 * rows.nbytes
        for name, run, q in (
            ("to fragments", nf4.to_fragments, rows),
            ("to rows", nf4.to_rows, fragments),
        ):
            functions: dict[str, Function] = {"nf4": partial(run, q)}
            functions["copy"] = cases.copy_of(moved, q.device)
            yield cases.Case({**weight.labels, "direction": name}, functions, moved)


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "repack", *sys.argv[1:]]))
