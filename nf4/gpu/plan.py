"""Which kernel multiplies: one table, by rows of x, sizes of W, dtype and device.

    weight             rows of x              what runs
    in fragments       1 or 2                 matmul_row: on the plain cores
    in fragments       up to 128              matmul_small: bound by the bytes of W
    in fragments       more, while faster     matmul: W decoded in the registers of the product
    any                the rest               dequantize into scratch, then the library's product

The first two are for blocks of 64 and more; matmul_row for double quantization and K of whole
groups of 256; 128 rows for W of so many rows that the widest tile fills the GPU, and 64 else.
"While faster" is measured where kernels/measured/ has a file for the device (`nf4 bench --tune`
writes it), and modelled elsewhere. In rows W always goes the last way, and so do float32, float64,
and a GPU without 16-bit tensor cores that Triton knows.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from nf4.kernels import _configs, matmul_row
from nf4.kernels._measured import measured
from nf4.tensor import fits_fragments
from nf4.tools.cost import (
    Device,
    dequantize_seconds,
    device_of,
    gemm_seconds,
    linear_limit_seconds,
)

SMALL_BLOCK_SIZE = 64  # the least that matmul_small takes
# Model: a library product reaches its throughput only with many rows; a kernel launch costs this.
LAUNCH_SECONDS = 3e-6
# Fitted to an H200's figures, see FITS of kernels/_configs.py: what dequantizing and few rows take
# of their least times; median error 6 and 10 %
DEQUANTIZE_SHARE = 1.27
ROW_SECONDS, ROW_SHARE = 4.5e-6, 1.85


@dataclass(frozen=True)
class Plan:
    """What multiplies, why, and how long it should take.

    Attributes:
        kernel: "matmul_row", "matmul_small", "matmul" or "dequantize".
        reason: one sentence.
        seconds: modelled time of the product, without an adapter.
    """

    kernel: str
    reason: str
    seconds: float


def has_matrix_kernels(device: torch.device) -> bool:
    """Return whether the kernels that multiply run on a device; a CPU stands for an H200."""
    if device.type != "cuda":
        return device.type == "cpu"
    if torch.version.hip:
        return "gfx9" in torch.cuda.get_device_properties(device).gcnArchName
    return torch.cuda.get_device_capability(device) >= (8, 0)


def wants_fragments(shape: torch.Size, block_size: int, device: torch.device) -> bool:
    """Return whether layers hold a weight in fragments: on a GPU with kernels for its shape."""
    return (
        device.type == "cuda" and fits_fragments(shape, block_size) and has_matrix_kernels(device)
    )


@lru_cache(maxsize=4096)
def plan(
    m: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    layout: str,
    block_size: int,
    double_quant: bool,
    device: torch.device,
) -> Plan:
    """Choose what multiplies x ``[m, K]`` by W, whose shape is N and K."""
    n, k = shape
    model = device_of(device)
    by_library = _library_seconds(m, n, k, block_size, model)
    if layout != "fragments":
        return Plan("dequantize", "the weight is in rows", by_library)
    if dtype not in (torch.float16, torch.bfloat16):
        return Plan("dequantize", f"x is {dtype}, not 16 bits wide", by_library)
    if not has_matrix_kernels(device):
        return Plan("dequantize", f"{model.name} has no tensor cores Triton knows", by_library)
    if m <= matmul_row.MOST_ROWS and _has_row_kernel(k, block_size, double_quant, device):
        seconds = ROW_SECONDS + ROW_SHARE * linear_limit_seconds(model, m, n, k)
        return Plan("matmul_row", f"{m} rows are at most {matmul_row.MOST_ROWS}", seconds)
    limit, source = fused_limit(n, k, block_size, device)
    most = min(limit, _configs.most_small_rows(n, device))
    if m <= most and block_size >= SMALL_BLOCK_SIZE:
        config = _configs.matmul_small_config(max(m, 1), n, k, device)
        seconds = _configs.seconds("matmul_small", config, model, m, n, k)
        return Plan("matmul_small", f"{m} rows are at most {most}", seconds)
    config = _configs.matmul_config(m, n, k, device)
    seconds = _configs.seconds("matmul", config, model, m, n, k)
    if m <= limit:
        return Plan("matmul", f"{m} rows are at most {limit}, {source}", seconds)
    return Plan("dequantize", f"{m} rows are more than {limit}, {source}", by_library)


def _has_row_kernel(k: int, block_size: int, double_quant: bool, device: torch.device) -> bool:
    return double_quant and not _configs.is_amd(device) and matmul_row.takes(k, block_size)


@lru_cache(maxsize=1024)
def fused_limit(n: int, k: int, block_size: int, device: torch.device) -> tuple[int, str]:
    """Return the rows up to which `matmul` beats the library on W ``[n, k]``, and who says so."""
    model = device_of(device)
    limits = measured(model.name).fused_limits
    if limits:
        nearest = min(limits, key=lambda row: abs(math.log(row[0] / n)) + abs(math.log(row[1] / k)))
        return nearest[2], f"measured on W {nearest[0]}×{nearest[1]}"
    rows = _configs.SMALL_M
    while rows < 8192 and _fused_wins(2 * rows, n, k, block_size, model, device):
        rows *= 2
    return rows, "modelled"


def _fused_wins(
    m: int, n: int, k: int, block_size: int, model: Device, device: torch.device
) -> bool:
    config = _configs.matmul_config(m, n, k, device)
    fused = _configs.seconds("matmul", config, model, m, n, k)
    return bool(fused < _library_seconds(m, n, k, block_size, model))


def _library_seconds(m: int, n: int, k: int, block_size: int, model: Device) -> float:
    dequantize = DEQUANTIZE_SHARE * dequantize_seconds(model, n, k, block_size)
    return dequantize + gemm_seconds(model, m, n, k) + LAUNCH_SECONDS
