"""Multiply by a quantized weight, from one row to a training batch: nf4, its kernel alone, others.

python bench/bench_matmul.py --help
"""

import sys
from collections.abc import Iterator

from nf4.bench.harness import cases, products

TITLE = "linear"
DEFAULTS = cases.Options(
    shapes=[(1024, 1024), (4096, 4096)], rows=[16, 64, 256], dtypes=["bf16", "fp32"]
)
ON_GPU = cases.Options(shapes=[(4096, 4096), (14336, 4096)], rows=[4**i for i in range(8)])


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases."""
    return products.make(options, "matmul")


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "matmul", *sys.argv[1:]]))
