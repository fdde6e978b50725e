"""What a call costs besides its time: memory, launches, and the time of the host."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Function = Callable[[], Any]
HOST_CALLS = 20
PROCESS = Path("/proc/self")


def cpu_peak(function: Function) -> int | None:
    """Return the most bytes that a call held beyond what the process held before it.

    Linux keeps a high-water mark of resident memory, and lets it be set back. What the C library
    keeps of freed memory is given back to the system before, or a call would take it unseen.

    Returns:
        Bytes in whole pages; None where the system keeps no mark, or another C library is used.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return None
    try:
        trim(0)
        (PROCESS / "clear_refs").write_text("5")  # proc(5): sets VmHWM to VmRSS
        before = _status("VmRSS")
        result = function()
        most = _status("VmHWM")
    except (OSError, KeyError):
        return None
    del result
    return max(0, most - before)


def gpu_peak(function: Function, device: torch.device) -> int:
    """Return the most bytes that a call took of PyTorch's allocator beyond those before it."""
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def launches(function: Function, device: torch.device) -> int | None:
    """Return how many kernels, copies and fills a call starts on a GPU; None if none is seen."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize(device)
    on_gpu = (e for e in seen.events() if e.device_type == DeviceType.CUDA)
    # Regions that torch.compile names are no launches. A profiler without the right to see the
    # device sees nothing at all.
    return sum(not e.is_user_annotation for e in on_gpu) or None


def host_microseconds(function: Function, device: torch.device) -> float:
    """Return the median time after which a call returns, with nothing to wait for on the GPU."""
    times = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize(device)
    return 1e6 * statistics.median(times)


def _status(key: str) -> int:
    """Return bytes from the system's account of this process."""
    lines = (PROCESS / "status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(found[key].split()[0])
