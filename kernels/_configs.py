"""Tile choices of the kernels that have a choice.

Chosen by what `nf4 bench --tune` measured, see kernels/_measured.py, and else by a model, no GPU
involved so far: the bytes of a launch over the memory's bandwidth, or what the busiest
multiprocessor has to do, whichever takes longer. The second counts, for a step of 64 columns, the
tensor cores, the instructions issued, and shared memory at 128 bytes a cycle, which shuffles,
loads, copies and the products' reads of x pass through: whichever is most.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..tools.cost import Device, device_of, weight_bytes
from ._measured import measured


@dataclass(frozen=True)
class MatmulConfig:
    """How a product is cut.

    Attributes:
        block_m: rows of x a program.
        block_n: rows of W a program.
        num_warps: of a program.
        num_stages: of the pipeline.
        cycles: that a step of 64 columns holds a multiprocessor, counted for sm_90 (of MATMUL_MMA
            for sm_80, of MATMUL_MFMA guessed).
        split_k: programs that share the columns.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    cycles: int
    split_k: int = 1


SMALL_M = 16  # rows that matmul_small takes
MATMUL_SMALL = (
    MatmulConfig(16, 128, 4, 3, 300),
    MatmulConfig(16, 64, 4, 4, 180),
)
MATMUL = (
    MatmulConfig(16, 64, 4, 4, 221),
    MatmulConfig(32, 64, 4, 4, 229),
    MatmulConfig(64, 64, 4, 4, 299),
    MatmulConfig(128, 64, 4, 4, 444),
    MatmulConfig(128, 128, 8, 3, 760),
    MatmulConfig(256, 128, 8, 3, 1144),
)
# What fits the registers of GPUs whose tensor cores read both factors from them
MATMUL_MMA = (
    MatmulConfig(16, 64, 4, 4, 256),
    MatmulConfig(32, 64, 4, 2, 323),
    MatmulConfig(64, 64, 4, 4, 419),
    MatmulConfig(128, 64, 4, 4, 509),
    MatmulConfig(128, 128, 8, 3, 1002),
)
MATMUL_MFMA = (
    MatmulConfig(16, 64, 4, 2, 400),
    MatmulConfig(64, 64, 4, 2, 400),
    MatmulConfig(128, 128, 4, 2, 1200),
)
# The GPUs of each, of those that kernels are compiled for
WGMMA = ("sm_90", "sm_100")
MMA = ("sm_80", "sm_89")
MFMA = ("gfx942", "gfx90a")
MATRIX = WGMMA + MMA + MFMA  # not gfx1100, where a weight is dequantized and the library multiplies
SPLITS = (1, 2, 3, 4, 6, 8)
MIN_STEPS = 8  # tiles of 64 columns that a program should have at least
# Guesses, until a GPU says better: what a pipeline reaches of what its busiest unit could; how much
# longer a program of 4 warps takes that is alone, when decoding does not overlap products; how much
# faster than the memory the cache is, where programs that split K leave their sums.
_EFFICIENCY, _ALONE, _CACHE = 0.85, 1.3, 2.5


def is_amd(device: torch.device) -> bool:
    """Return whether a device is a GPU of AMD, which PyTorch calls cuda too."""
    return device.type == "cuda" and torch.version.hip is not None


def padded_rank(rank: int) -> int:
    """Return 0, or the power of two from 16 on that a matrix product takes for a rank."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


def seconds(config: MatmulConfig, device: Device, m: int, n: int, k: int) -> float:
    """Return the modelled time of a launch."""
    programs = -(-m // config.block_m) * -(-n // config.block_n) * config.split_k
    a_multiprocessor = -(-programs // device.sms)
    steps = -(-(k // 64) // config.split_k)
    compute = a_multiprocessor * steps * config.cycles / device.clock / _EFFICIENCY
    if a_multiprocessor * config.num_warps < 8:
        compute *= _ALONE
    moved = weight_bytes(n, k) + 2 * (m * k + m * n)
    if config.split_k > 1:
        moved += 8 * config.split_k * m * n / _CACHE
    return max(moved / device.bandwidth, compute)


def ranked(op: str, m: int, n: int, k: int, device: torch.device) -> list[MatmulConfig]:
    """Return the cuts of "matmul" or "matmul_small" on a device, those first that the model likes.

    matmul_small takes its 16 rows whatever m is.
    """
    if op == "matmul_small":
        m = SMALL_M
    model = device_of(device)
    splits = _splits(k, device)
    cuts = [replace(config, split_k=s) for config in _tiles(op, device) for s in splits]
    return sorted(cuts, key=lambda config: seconds(config, model, m, n, k))


def _splits(k: int, device: torch.device) -> list[int]:
    """Return in how many parts K can be cut on a device.

    One on AMD: there a barrier does not wait for what other waves have stored, so that the last
    program of `add_parts` might read sums that are not there yet.
    """
    if is_amd(device):
        return [1]
    return [s for s in SPLITS if s == 1 or k // 64 >= s * MIN_STEPS]


def _best(op: str, m: int, n: int, k: int, device: torch.device) -> MatmulConfig:
    """Return the cut measured as the fastest, or else the one that the model likes best."""
    cuts = ranked(op, m, n, k, device)
    found = measured(device_of(device).name).tile(op, m, n, k)
    fastest = (c for c in cuts if (c.block_m, c.block_n, c.split_k) == found)
    return next(fastest, cuts[0])


@lru_cache(maxsize=4096)
def matmul_config(m: int, n: int, k: int, device: torch.device) -> MatmulConfig:
    """Return how `matmul` cuts a product of these sizes on a device."""
    return _best("matmul", m, n, k, device)


@lru_cache(maxsize=4096)
def matmul_small_config(n: int, k: int, device: torch.device) -> MatmulConfig:
    """Return how `matmul_small` cuts a product of these sizes on a device."""
    return _best("matmul_small", SMALL_M, n, k, device)


def _tiles(op: str, device: torch.device) -> tuple[MatmulConfig, ...]:
    if op == "matmul_small":
        return MATMUL_SMALL
    if is_amd(device):
        return MATMUL_MFMA
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        return MATMUL_MMA
    return MATMUL


@lru_cache(maxsize=4096)
def lora_down_config(m: int, k: int, rank: int, device: torch.device) -> MatmulConfig:
    """Return how `lora_down` cuts x ``[m, k]``: two programs a multiprocessor, if it can."""
    block_m = 16 if m <= SMALL_M else 64
    tiles = -(-m // block_m)
    enough = _splits(k, device)
    split = next((s for s in enough if tiles * s >= 2 * device_of(device).sms), enough[-1])
    warps, stages = lora_down_warps(rank)
    if is_amd(device):
        stages = 2  # what 64 KB of shared memory hold of x and A
    return MatmulConfig(block_m, padded_rank(rank), warps, stages, 0, split)


def lora_down_warps(rank: int) -> tuple[int, int]:
    """Return warps and stages of `lora_down`: what registers and shared memory hold of A."""
    return (4, 4) if rank <= 64 else (8, 2)
