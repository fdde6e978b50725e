"""Time functions against each other; afterwards take their memory, launches and cost to the host.

Before each call a GPU's cache is written over; the writing also hides what the host takes to
launch. A CPU's is emptied by reading twice its size: a write would leave lines that have to go to
memory during the call. The threads that read are given time to fall asleep, for those of OpenMP
spin at first, and would be counted as the function's. Reading also drives out the code, which is
never cold while a model runs, and costs a call on a 1024×1024 weight as much again: so the function
is then called on a small weight, and only then timed.
"""

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nf4.bench.harness import footprint

Function = Callable[[], Any]
WARM_UP = 2  # rounds that are not counted
ROUNDS, FEWEST = 20, 7  # where no number is asked for, as many as take about SECONDS
SECONDS = 3.0
FALL_ASLEEP = 2e-3  # seconds; GNU's OpenMP spins for less than one millisecond
GPU_CACHE = 1 << 28  # bytes, more than any GPU's


@dataclass(frozen=True)
class Timing:
    """What one function took.

    Attributes:
        median, p20, p80: microseconds of a call, with giving back what it returned.
        least: those of the fastest.
        rounds: calls that were counted.
        cpu: median of the microseconds of all threads of the process, on a CPU.
        peak: bytes beyond what was held before the call; None where the system does not say.
        launches: kernels, copies and fills that a call starts, on a GPU.
        host: median of the microseconds after which a call returns, on a GPU.
    """

    median: float
    p20: float
    p80: float
    least: float
    rounds: int
    cpu: float | None = None
    peak: int | None = None
    launches: int | None = None
    host: float | None = None


def interleaved(
    functions: dict[str, Function],
    device: torch.device,
    rounds: int | None = None,
    small: dict[str, Function] | None = None,
) -> dict[str, Timing]:
    """Time functions in turn, round by round, so that a drift of the machine meets all of them.

    On a GPU the time of each call is taken by events, on a CPU by the clock.

    Args:
        functions: what to time, by name.
        device: where they run; on a GPU the current one.
        rounds: calls of each function, after two that are not counted; None for 20, or fewer where
            these would take more than `SECONDS`, but at least 7.
        small: on a CPU, the same functions on a small weight, as far as there are, to be called
            after its cache was emptied. None leaves the cache as it is.

    Returns:
        A `Timing` for each name.
    """

    def clock(name: str) -> tuple[float, float]:
        if device.type == "cuda" or small is not None:
            empty_cache(device, (small or {}).get(name))
        return (_gpu_clock if device.type == "cuda" else _cpu_clock)(functions[name])

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    with _no_collection():
        for _ in range(WARM_UP):
            begin = time.perf_counter()
            for name in functions:
                clock(name)
        if rounds is None:
            took = time.perf_counter() - begin
            rounds = max(FEWEST, min(ROUNDS, int(SECONDS / took)))
        for _ in range(rounds):
            for name in functions:
                found[name].append(clock(name))
    return {name: _timing(functions[name], times, device) for name, times in found.items()}


def _timing(function: Function, times: list[tuple[float, float]], device: torch.device) -> Timing:
    """Return a function's `Timing`; calls it some more times."""
    wall, cpu = np.array(times).T
    least, p20, median, p80 = (float(x) for x in np.quantile(wall, (0, 0.2, 0.5, 0.8)))
    found = Timing(median, p20, p80, least, len(times))
    if device.type != "cuda":
        peak = footprint.cpu_peak(function)
        return replace(found, cpu=float(np.median(cpu)), peak=peak)
    return replace(
        found,
        peak=footprint.gpu_peak(function, device),
        launches=footprint.launches(function, device),
        host=footprint.host_microseconds(function, device),
    )


def empty_cache(device: torch.device, small: Function | None = None) -> None:
    """Drive everything out of a cache.

    Args:
        device: whose; a GPU only begins with it.
        small: called afterwards on a CPU, to have its code in the cache again.
    """
    if device.type == "cuda":
        _memory(GPU_CACHE, device).zero_()
        return
    _memory(2 * cpu_cache(), device).sum()
    time.sleep(FALL_ASLEEP)
    if small is not None:
        small()


def _cpu_clock(function: Function) -> tuple[float, float]:
    """Return the microseconds of a call, and those of all threads together."""
    cpu, begin = time.process_time(), time.perf_counter()
    function()
    end, cpu_end = time.perf_counter(), time.process_time()
    return 1e6 * (end - begin), 1e6 * (cpu_end - cpu)


def _gpu_clock(function: Function) -> tuple[float, float]:
    """Return the microseconds of a call on the current GPU, and 0."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end), 0.0


@lru_cache(maxsize=1)
def _memory(size: int, device: torch.device) -> Tensor:
    """Return memory to write over, or to read."""
    return torch.zeros(size // 8, dtype=torch.int64, device=device)


@lru_cache
def cpu_cache() -> int:
    """Return the bytes of the largest cache of a CPU; 32 MB where the system does not say."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes)


@contextmanager
def _no_collection() -> Any:
    """Keep Python from collecting garbage while the block runs."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
