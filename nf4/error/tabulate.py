"""Compute what theory.json holds; ``python -m nf4.error.tabulate`` writes it anew."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from nf4.codebook import BLOCK_SIZES
from nf4.error.codebooks import CODEBOOKS, COMPUTED, compute_codebook
from nf4.error.tabulated import FILE, key
from nf4.error.theory import compute_error

Table = dict[str, dict[str, list[float]]]


def compute(block_sizes: Iterable[int] = BLOCK_SIZES) -> Table:
    """Return computed levels, and errors of every codebook; of NF4 with double quantization too.

    Args:
        block_sizes: for which.
    """
    table: Table = {"levels": {}, "errors": {}}
    for size in block_sizes:
        for name in CODEBOOKS:
            held = compute_codebook(name, size) if name in COMPUTED else None
            if held is not None:
                table["levels"][key(name, size)] = list(held)
            for double_quant in (False, True) if name == "nf4" else (False,):
                e = compute_error(name if held is None else held, size, double_quant, name)
                table["errors"][key(name, size, double_quant)] = [e.mse, e.mae, e.max_abs]
    return table


def as_text(table: Table) -> str:
    """Return a table as JSON, a line an entry."""
    parts = []
    for part, rows in table.items():
        lines = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
        parts.append(f" {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    path = Path(__file__).with_name(FILE)
    path.write_text(as_text(compute()), encoding="utf-8")
    sys.stdout.write(f"{path}\n")
