"""What `nf4 bench --tune` measured on a GPU: one file a device, kernels/measured/<device>.json.

fused_limits   [N, K, M]: up to M rows matmul was faster than dequantize and the library
tiles          [kernel, M, N, K, BLOCK_M, BLOCK_N, SPLIT_K, microseconds]: the fastest cut
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..tools.caches import forgettable

FOLDER = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class Measured:
    """What is known of a device.

    Attributes:
        fused_limits: (N, K, M).
        tiles: (BLOCK_M, BLOCK_N, SPLIT_K) by kernel, M, N and K.
    """

    fused_limits: tuple[tuple[int, int, int], ...] = ()
    tiles: dict[tuple[str, int, int, int], tuple[int, int, int]] | None = None

    def tile(self, kernel: str, m: int, n: int, k: int) -> tuple[int, int, int] | None:
        """Return the fastest cut of a product of at most a power of two of rows, if it is known."""
        rows = max(16, 1 << (m - 1).bit_length())
        return (self.tiles or {}).get((kernel, rows, n, k))


def file_of(name: str) -> Path:
    """Return where the figures of a device are kept."""
    return FOLDER / f"{name.replace(' ', '-')}.json"


@forgettable
@lru_cache
def measured(name: str) -> Measured:
    """Return what was measured on a device of nf4/tools/cost.py; nothing if there is no file."""
    path = file_of(name)
    if not path.is_file():
        return Measured()
    found = json.loads(path.read_text(encoding="utf-8"))
    return Measured(
        tuple((n, k, m) for n, k, m in found["fused_limits"]),
        {(op, m, n, k): tuple(cut) for op, m, n, k, *cut, _ in found["tiles"]},
    )
