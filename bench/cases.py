"""What the benchmarks of the quantizers share: shapes, peers, a row for each shape and dtype."""

import importlib.util
from collections.abc import Callable
from typing import Any

import measure
import torch

SHAPES = {
    "cuda": [(1024, 1024), (4096, 4096), (14336, 4096), (28672, 8192)],
    "cpu": [(1024, 1024), (4096, 4096)],
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COLUMNS = ("shape", "dtype", "who", "median µs", "p20–p80 µs", "GB/s", "time / ours")


def bitsandbytes() -> Any:
    """Return bitsandbytes.functional, or None where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes.functional

    return bitsandbytes.functional


def rows(
    make: Callable[[tuple[int, int], torch.dtype], tuple[dict[str, measure.Function], int]],
) -> list[list[object]]:
    """Measure each shape and dtype.

    Args:
        make: returns the functions to time by name, "nf4" among them, and the bytes moved. It has
            checked ours against the reference, and raises if they differ.
    """
    table: list[list[object]] = []
    for shape in SHAPES[DEVICE.type]:
        for dtype in (torch.bfloat16, torch.float32):
            functions, moved = make(shape, dtype)
            source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE)
            target = torch.empty_like(source)
            functions["copy of the same bytes"] = lambda s=source, t=target: t.copy_(s)
            timings = measure.interleaved(functions, DEVICE)
            for name, t in timings.items():
                table.append(
                    [
                        f"{shape[0]}×{shape[1]}",
                        str(dtype).removeprefix("torch."),
                        name,
                        f"{t.median:.0f}",
                        f"{t.p20:.0f}–{t.p80:.0f}",
                        f"{moved / t.median / 1e3:.1f}",
                        f"{t.median / timings['nf4'].median:.2f}",
                    ]
                )
    return table


def check_equal(ours: torch.Tensor, reference: torch.Tensor, what: str) -> None:
    """Raise unless a result equals the reference's: a wrong result is not timed."""
    if not torch.equal(ours, reference):
        raise ValueError(f"{what}: expected the reference's result, got another; not timed")
