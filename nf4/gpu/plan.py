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

A low-rank update goes with it: kernels take t = x @ A.T beside x. Before a library's product it is
merged into W in fragments as that is dequantized (dequantize_merge), which dropout forbids: then it
is added on top (dequantize). What no kernel of an adapter takes PyTorch adds (unfused).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

import torch

from nf4.kernels import _configs, matmul_row
from nf4.kernels._measured import measured
from nf4.tensor import Weight, fits_fragments
from nf4.tools.caches import forgettable
from nf4.tools.choice import Choice
from nf4.tools.cost import (
    Device,
    dequantize_seconds,
    device_of,
    gemm_seconds,
    linear_limit_seconds,
)
from nf4.tools.terms import LowRank

SMALL_BLOCK_SIZE = 64  # the least that matmul_small takes
# Model: a library product reaches its throughput only with many rows; a kernel launch costs this.
LAUNCH_SECONDS = 3e-6
# Fitted to an H200's figures, see FITS of kernels/_configs.py: what dequantizing and few rows take
# of their least times; median error 6 and 10 %
DEQUANTIZE_SHARE = 1.27
ROW_SECONDS, ROW_SHARE = 4.5e-6, 1.85


MAX_RANK = 256
# What the fused kernels take: they divide their sums by it, and multiply later
LEAST_SCALING, GREATEST_SCALING = 2.0**-100, 2.0**100
_always: ContextVar[str | None] = ContextVar("always", default=None)


class Asked(NamedTuple):
    """What a choice depends on.

    Attributes:
        op: "linear" or "lora_linear", or one of these with "_backward".
        rows: of x.
        shape: of W, N and K.
        dtype: of x.
        layout: of W.
        block_size: of W.
        double_quant: of W.
        device: of all.
        rank: of the low-rank update, 0 for none.
        drops: whether its dropout drops.
        can_divide: whether sums may be divided by its scaling.
        always: the kernel that has to multiply, for tests and benchmarks.
    """

    op: str
    rows: int
    shape: tuple[int, int]
    dtype: torch.dtype
    layout: str
    block_size: int
    double_quant: bool
    device: torch.device
    rank: int = 0
    drops: bool = False
    can_divide: bool = True
    always: str | None = None


@contextmanager
def always(kernel: str) -> Iterator[None]:
    """Let one kernel multiply, whatever the sizes: for tests and benchmarks."""
    token = _always.set(kernel)
    try:
        yield
    finally:
        _always.reset(token)


def choose(
    op: str, rows: int, weight: Weight, dtype: torch.dtype, low_rank: LowRank | None = None
) -> Choice:
    """Choose how an operator is computed; `how` is a kernel's name, or "unfused".

    Args:
        op: as in `Asked`.
        rows: of x.
        weight: W ``[N, K]``.
        dtype: of x.
        low_rank: the update, of a "lora_linear".
    """
    (n, k), packed = weight.shape, weight.packed
    form = (weight.layout, weight.block_size, weight.absmax2 is not None, packed.device)
    rank, drops, can_divide = 0, False, True
    if low_rank is not None:
        rank, drops = low_rank.lora_A.shape[0], low_rank.dropout.seed is not None
        can_divide = LEAST_SCALING <= abs(low_rank.scaling) <= GREATEST_SCALING
    given = (op, rows, (n, k), dtype, *form, rank, drops, can_divide, _always.get())
    return chosen(tuple.__new__(Asked, given))  # what Asked(*given) comes to, a call less


@forgettable
@lru_cache(maxsize=4096)
def chosen(asked: Asked) -> Choice:
    """Return what `choose` does."""
    op, _, _, dtype, layout, *_, device, rank, drops, can_divide, _ = asked
    base = _product(asked)
    if op.endswith("_backward") and base.how != "dequantize":
        base = _by_library(asked, "a gradient is a library's product")
    if not op.startswith("lora_linear"):
        return base
    unfit = _unfit(asked)
    if unfit:
        return Choice("unfused", unfit)
    how, reason = base.how, base.reason
    if how != "dequantize" and not can_divide:
        how, reason = "dequantize", "sums cannot be divided by the update's scaling"
    elif how == "dequantize" and layout == "fragments" and not drops:
        how, reason = "dequantize_merge", f"{reason}; the update of rank {rank} is merged into W"
    return Choice(how, reason, _plus_update(base, asked))


def _unfit(asked: Asked) -> str:
    """Return why no kernel of an adapter takes what is asked; dropout goes by groups of eight."""
    if asked.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {asked.dtype}, not 16 bits wide"
    if not has_matrix_kernels(asked.device):
        return f"{device_of(asked.device).name} has no tensor cores Triton knows"
    if asked.rank > MAX_RANK:
        return f"rank {asked.rank} is more than {MAX_RANK}"
    if asked.drops and asked.shape[1] % 8:
        return f"dropout takes columns by eight, and there are {asked.shape[1]}"
    return ""


def _plus_update(base: Choice, asked: Asked) -> float | None:
    """Return the seconds of a product with its update: what its passes move over bandwidth."""
    if base.seconds is None:
        return None
    m, (n, k), r = asked.rows, asked.shape, asked.rank
    moved, launches = 2 * m * (k + r) + 4 * r * (n + k), 1
    if asked.op.endswith("_backward"):  # dy is read for dB and u too
        moved, launches = moved + 2 * m * (n + r) + 4 * r * (n + k), 4
    if asked.drops:
        moved, launches = moved + 4 * m * n, launches + 1
    return base.seconds + launches * LAUNCH_SECONDS + moved / device_of(asked.device).bandwidth


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


def _product(asked: Asked) -> Choice:
    """Return what multiplies x ``[rows, K]`` by W."""
    m, (n, k), dtype, device = asked.rows, asked.shape, asked.dtype, asked.device
    if asked.always is not None:
        return Choice(asked.always, "asked for", 0.0)
    model = device_of(device)
    if asked.layout != "fragments":
        return _by_library(asked, "the weight is in rows")
    if dtype not in (torch.float16, torch.bfloat16):
        return _by_library(asked, f"x is {dtype}, not 16 bits wide")
    if not has_matrix_kernels(device):
        return _by_library(asked, f"{model.name} has no tensor cores Triton knows")
    if m <= matmul_row.MOST_ROWS and _has_row_kernel(asked):
        seconds = ROW_SECONDS + ROW_SHARE * linear_limit_seconds(model, m, n, k)
        return Choice("matmul_row", f"{m} rows are at most {matmul_row.MOST_ROWS}", seconds)
    limit, source = fused_limit(n, k, asked.block_size, device)
    most = min(limit, _configs.most_small_rows(n, device))
    if m <= most and asked.block_size >= SMALL_BLOCK_SIZE:
        config = _configs.matmul_small_config(max(m, 1), n, k, device)
        seconds = _configs.seconds("matmul_small", config, model, m, n, k)
        return Choice("matmul_small", f"{m} rows are at most {most}", seconds)
    config = _configs.matmul_config(m, n, k, device)
    seconds = _configs.seconds("matmul", config, model, m, n, k)
    if m <= limit:
        return Choice("matmul", f"{m} rows are at most {limit}, {source}", seconds)
    return _by_library(asked, f"{m} rows are more than {limit}, {source}")


def _by_library(asked: Asked, reason: str) -> Choice:
    model, sizes = device_of(asked.device), (asked.rows, *asked.shape)
    return Choice("dequantize", reason, _library_seconds(*sizes, asked.block_size, model))


def _has_row_kernel(asked: Asked) -> bool:
    takes = asked.double_quant and matmul_row.takes(asked.shape[1], asked.block_size)
    return takes and not _configs.is_amd(asked.device)


@forgettable
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
