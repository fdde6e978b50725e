"""Time functions against each other, and take their peak memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Function = Callable[[], Any]
WARM_UP = 2  # rounds that are not counted


@dataclass(frozen=True)
class Timing:
    """What one function took.

    Attributes:
        median, p20, p80: microseconds of a call.
        peak: bytes beyond what was held before the call; None on a CPU, where PyTorch does not say.
    """

    median: float
    p20: float
    p80: float
    peak: int | None


def interleaved(
    functions: dict[str, Function], device: torch.device, rounds: int = 20
) -> dict[str, Timing]:
    """Time functions in turn, round by round, so that a drift of the machine meets all of them.

    On a GPU the time of each call is taken by events, after its cache was written over; the writing
    also hides what the host takes to launch. On a CPU it is the clock's.

    Returns:
        A `Timing` for each name.
    """
    gpu = device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in functions}
    peaks: dict[str, int | None] = dict.fromkeys(functions)
    for _ in range(rounds + WARM_UP):
        for name, function in functions.items():
            if gpu:
                elapsed, peaks[name] = _on_gpu(function, device)
            else:
                begin = time.perf_counter()
                function()
                elapsed = 1e6 * (time.perf_counter() - begin)
            times[name].append(elapsed)
    timings = {}
    for name, found in times.items():
        kept = sorted(found[WARM_UP:])
        p20, p80 = (kept[int(share * (len(kept) - 1))] for share in (0.2, 0.8))
        timings[name] = Timing(statistics.median(kept), p20, p80, peaks[name])
    return timings


def _on_gpu(function: Function, device: torch.device) -> tuple[float, int]:
    """Return the microseconds and the extra bytes of a call."""
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush(device).zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end), torch.cuda.max_memory_allocated(device) - held


@lru_cache
def _flush(device: torch.device) -> Tensor:
    """Return memory larger than any GPU's cache."""
    return torch.empty(1 << 28, dtype=torch.uint8, device=device)
