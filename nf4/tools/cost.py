"""A model of time on a GPU: bytes over bandwidth, flops over throughput, cycles of the kernels.

The figures of devices are those of nf4/tools/devices.py. What comes out is called modelled, never
measured.
"""

from functools import lru_cache

import torch

from nf4.tools.caches import forgettable
from nf4.tools.devices import DEVICES, Device

__all__ = [
    "DEVICES",
    "Device",
    "backward_limit_seconds",
    "dequantize_seconds",
    "device_of",
    "gemm_seconds",
    "linear_limit_seconds",
    "weight_bytes",
]


@forgettable
@lru_cache
def device_of(device: torch.device) -> Device:
    """Return the model of a device; the H200's where the device is no GPU, for a plan ahead."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEVICES[0]
    found = torch.cuda.get_device_properties(device)
    for known in DEVICES:
        if known.name in found.name:
            return known
    # Unknown: an H200 of as many multiprocessors
    share = found.multi_processor_count / DEVICES[0].sms
    return Device(
        found.name,
        DEVICES[0].bandwidth * share,
        DEVICES[0].flops * share,
        found.multi_processor_count,
        DEVICES[0].clock,
    )


def weight_bytes(n: int, k: int, block_size: int = 64, double_quant: bool = True) -> float:
    """Return the bytes of a quantized weight ``[n, k]``."""
    scale = 1 + 4 / 256 if double_quant else 4
    return n * k * (0.5 + scale / block_size)


def dequantize_seconds(device: Device, n: int, k: int, block_size: int = 64) -> float:
    """Return the least time to write a weight ``[n, k]`` out in 16 bits."""
    return (weight_bytes(n, k, block_size) + 2 * n * k) / device.bandwidth


def gemm_seconds(device: Device, m: int, n: int, k: int) -> float:
    """Return the least time of a 16-bit product ``[m, k] @ [k, n]`` by the library."""
    moved = 2 * (m * k + k * n + m * n)
    return max(moved / device.bandwidth, 2 * m * n * k / device.flops)


def linear_limit_seconds(device: Device, m: int, n: int, k: int, r: int = 0) -> float:
    """Return the limit of y = x @ W.T + t @ B.T, t = x @ A.T: W read once in 4 bits."""
    moved = weight_bytes(n, k) + 2 * (m + r) * (k + n)
    return max(moved / device.bandwidth, 2 * m * (n * k + r * (n + k)) / device.flops)


def backward_limit_seconds(device: Device, m: int, n: int, k: int, r: int) -> float:
    """Return the limit of the gradients of x, A and B: dy and x read once, W in 4 bits."""
    moved = weight_bytes(n, k) + 2 * m * n + 4 * m * k + 6 * r * (n + k) + 4 * m * r
    return max(moved / device.bandwidth, 2 * m * (n * k + 2 * r * (n + k)) / device.flops)
