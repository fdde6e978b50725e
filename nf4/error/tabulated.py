"""What theory gives for N(0, 1), from theory.json: the same for every model, and long to compute.

`nf4.error.tabulate` writes the file; a test computes it again.
"""

import json
from functools import lru_cache
from importlib.resources import files

from nf4.tools.caches import forgettable

FILE = "theory.json"


def key(codebook: str, block_size: int, double_quant: bool = False) -> str:
    """Return the name of an entry."""
    return f"{codebook} {block_size}{' double' * double_quant}"


@forgettable
@lru_cache
def _table() -> dict[str, dict[str, list[float]]]:
    text = files("nf4.error").joinpath(FILE).read_text(encoding="utf-8")
    found: dict[str, dict[str, list[float]]] = json.loads(text)
    return found


def levels(codebook: str, block_size: int) -> tuple[float, ...]:
    """Return the levels of a codebook that is computed for a block size."""
    return tuple(_table()["levels"][key(codebook, block_size)])


def errors(codebook: str, block_size: int, double_quant: bool) -> tuple[float, float, float] | None:
    """Return the mse, mae and max_abs expected of N(0, 1); None if they are not in the file.

    Args:
        codebook: its name.
        block_size: values that share one scale, and of the tensor whose largest error is meant.
        double_quant: whether the scales are quantized to 8 bits.
    """
    found = _table()["errors"].get(key(codebook, block_size, double_quant))
    return None if found is None else (found[0], found[1], found[2])
