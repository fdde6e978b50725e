"""Multiply one or two rows by a quantized weight: nf4, its kernel alone, others.

python bench/bench_matmul_row.py --help
"""

import sys
from collections.abc import Iterator

from nf4.bench.harness import cases, products

TITLE = "linear, one or two rows"
DEFAULTS = cases.Options(shapes=[(1024, 1024), (4096, 4096)], rows=[1, 2], dtypes=["bf16", "fp32"])
ON_GPU = cases.Options(shapes=[(4096, 4096), (14336, 4096)], rows=[1, 2])


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    return products.make(options, "matmul_row")


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "matmul_row", *sys.argv[1:]]))
