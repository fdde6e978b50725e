"""Time functions against each other, and print one Markdown table."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Times of one function, in microseconds."""

    median: float
    p20: float
    p80: float


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(functions: dict[str, Function], device: torch.device, rounds: int = 20):
    """Time functions in turn, round by round, so that a drift of the machine meets all of them.

    Each call is timed on its own, from a synchronized device to a synchronized device.

    Returns:
        A `Timing` for each name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 2):  # the first two warm up
        for name, function in functions.items():
            synchronize(device)
            begin = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    timings = {}
    for name, times in seconds.items():
        kept = sorted(1e6 * t for t in times[2:])
        p20, p80 = (kept[int(share * (len(kept) - 1))] for share in (0.2, 0.8))
        timings[name] = Timing(statistics.median(kept), p20, p80)
    return timings


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print rows as Markdown, with the device and the versions they were measured with."""
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    columns = list(columns)
    lines = [f"## {title}", "", f"{name}, torch {torch.__version__}", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    print("\n".join(lines) + "\n")  # noqa: T201  a benchmark's purpose is its table
