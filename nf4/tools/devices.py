"""GPUs as models of time know them: bandwidth, throughput, multiprocessors, clock.

The figures of the H200 are ceilings of copies and matrix products that others measured, those of
other devices data sheet values times the same shares.
"""

from dataclasses import dataclass

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
