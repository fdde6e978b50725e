"""A model of time on a GPU: bytes over bandwidth, flops over throughput, cycles of the kernels.

The figures of the H200 are ceilings of copies and matrix products that others measured, those of
other devices data sheet values times the same shares. What comes out is called modelled, never
measured.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from nf4.tools.caches import forgettable

# Shares of the data sheet's bandwidth and dense 16-bit throughput that an H200 was seen to reach
_BANDWIDTH_SHARE, _FLOPS_SHARE = 0.9, 0.8


@dataclass(frozen=True)
class Device:
    """What a model needs to know of a GPU.

    Attributes:
        name: as PyTorch gives it, or a part of that.
        bandwidth: of a copy, bytes read plus written, per second.
        flops: of a large dense 16-bit matrix product, per second.
        sms: multiprocessors.
        clock: of a multiprocessor, cycles per second.
    """

    name: str
    bandwidth: float
    flops: float
    sms: int
    clock: float


DEVICES = (
    Device("H200", 4.3e12, 790e12, 132, 1.755e9),
    Device("H100 PCIe", 2.0e12 * _BANDWIDTH_SHARE, 756e12 * _FLOPS_SHARE, 114, 1.755e9),
    Device("H100", 3.35e12 * _BANDWIDTH_SHARE, 989e12 * _FLOPS_SHARE, 132, 1.755e9),
    Device("B200", 8.0e12 * _BANDWIDTH_SHARE, 2250e12 * _FLOPS_SHARE, 148, 1.85e9),
    Device("A100", 2.0e12 * _BANDWIDTH_SHARE, 312e12 * _FLOPS_SHARE, 108, 1.41e9),
    Device("L40S", 0.864e12 * _BANDWIDTH_SHARE, 362e12 * _FLOPS_SHARE, 142, 2.52e9),
    Device("4090", 1.008e12 * _BANDWIDTH_SHARE, 165e12 * _FLOPS_SHARE, 128, 2.52e9),
    Device("3090", 0.936e12 * _BANDWIDTH_SHARE, 71e12 * _FLOPS_SHARE, 82, 1.695e9),
    Device("MI300X", 5.3e12 * _BANDWIDTH_SHARE, 1307e12 * _FLOPS_SHARE, 304, 2.1e9),
)


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
