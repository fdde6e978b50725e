"""What this device was seen to reach in the same run: a copy, and large matrix products."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nf4.bench.harness.cases import DTYPES, copy_of
from nf4.bench.harness.measure import Function, cpu_cache, interleaved

GPU_COPY = 1 << 31  # bytes read and written together
CPU_COPY = 1 << 28
GPU_SIZE, CPU_SIZE = 8192, 1536  # M, N and K of the products
TRIAL_SIZE, SLOW = 384, 1e10  # flops per second below which a CPU multiplies no larger matrices
ROUNDS = 10


@dataclass(frozen=True)
class Ceilings:
    """Measured limits.

    Attributes:
        copy: bytes per second, read plus written.
        products: flops per second of a matrix product, by name of dtype.
        spread: the largest ratio of an 80th percentile to a 20th among them; far above 1 where
            other work disturbs the machine.
    """

    copy: float
    products: dict[str, float]
    spread: float

    def microseconds(self, moved: float, flops: float, dtype: str) -> float:
        """Return the time of the bytes at the copy's speed or of the flops at the product's."""
        return 1e6 * max(moved / self.copy, flops / self.products[dtype])


def measure_ceilings(device: torch.device, dtypes: Iterable[str]) -> Ceilings:
    """Measure a copy larger than any cache, and a large product in each dtype.

    By the fastest call of each: what disturbs a call says nothing of what the device can reach.
    """
    gpu = device.type == "cuda"
    size = GPU_SIZE if gpu else CPU_SIZE
    moved = GPU_COPY if gpu else max(CPU_COPY, 4 * cpu_cache())
    functions = {"copy": copy_of(moved, device)}
    sizes = {}
    for name in dict.fromkeys(dtypes):
        sizes[name] = size if gpu or not _is_slow(DTYPES[name], device) else TRIAL_SIZE
        functions[name] = _product(sizes[name], DTYPES[name], device)
    found = interleaved(functions, device, ROUNDS, small={})
    seconds = {name: 1e-6 * timing.least for name, timing in found.items()}
    copy = seconds.pop("copy")
    products = {name: 2 * sizes[name] ** 3 / s for name, s in seconds.items()}
    spread = max(timing.p80 / timing.p20 for timing in found.values())
    return Ceilings(moved / copy, products, spread)


def _is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a CPU has no instructions for a dtype's products, and takes seconds."""
    product = _product(TRIAL_SIZE, dtype, device)
    product()
    begin = time.perf_counter()
    product()
    return 2 * TRIAL_SIZE**3 / (time.perf_counter() - begin) < SLOW


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Function:
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out)
