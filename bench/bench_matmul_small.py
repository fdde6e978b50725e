"""Multiply a few rows by a quantized weight: nf4, its kernel alone, others.

python bench/bench_matmul_small.py --help
"""

import sys
from collections.abc import Iterator

from nf4.bench.harness import cases, products

TITLE = "linear, few rows"
DEFAULTS = cases.Options(
    shapes=[(1024, 1024), (4096, 4096)], rows=[1, 4, 16], dtypes=["bf16", "fp32"]
)
ON_GPU = cases.Options(shapes=[(4096, 4096), (14336, 4096)], rows=[1, 2, 4, 8, 16])


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    return products.make(options, "matmul_small")


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "matmul_small", *sys.argv[1:]]))
