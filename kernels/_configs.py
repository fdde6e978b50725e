"""Tile choices of the kernels that have a choice.

Chosen by what `nf4 bench --tune` measured, see kernels/_measured.py, and else by a model: the bytes
of a launch over the memory's bandwidth, or what the busiest multiprocessor has to do, whichever
takes longer. The second is, for a step of 64 columns, what its loads have to be waited for, or the
cycles of its busiest unit: the tensor cores, the instructions issued, or shared memory at 128 bytes
a cycle, which shuffles, loads, copies and the products' reads of x pass through.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..tools.caches import forgettable
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


SMALL_M = 16  # rows that a tensor core takes at least
# Of each number of rows that matmul_small takes, as swept on an H200; elsewhere those of 16 alone
MATMUL_SMALL = (
    MatmulConfig(16, 64, 4, 3, 180),
    MatmulConfig(32, 64, 4, 3, 229),
    MatmulConfig(64, 64, 4, 3, 299),
    MatmulConfig(128, 128, 8, 3, 760),
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
_CACHE = 2.5  # a guess: times the memory's bandwidth, where programs that split K leave sums


@dataclass(frozen=True)
class Fit:
    """What a model of a kernel's time takes from an H200's figures, see `seconds`.

    Attributes:
        launch: seconds of a launch that does next to nothing.
        latency: cycles of a step of 64 columns that waits for its loads.
        together: programs of 4 warps a multiprocessor that wait at the same time.
        efficiency: what the busiest unit reaches of what it could.
    """

    launch: float
    latency: int
    together: int
    efficiency: float


# Fitted to 115 and 35 rows of bench/results/h200/sweep.json; the median error is 7 and 13 %
FITS = {"matmul_small": Fit(4e-6, 300, 1, 0.7), "matmul": Fit(5e-6, 1500, 3, 0.4)}
SPLIT_SECONDS = 2e-6  # of leaving sums and reading them again


def is_amd(device: torch.device) -> bool:
    """Return whether a device is a GPU of AMD, which PyTorch calls cuda too."""
    return device.type == "cuda" and torch.version.hip is not None


@forgettable
@lru_cache
def has_wgmma(device: torch.device) -> bool:
    """Return whether tensor cores read from shared memory, as an H200's; a CPU stands for one."""
    if device.type != "cuda":
        return True
    return not is_amd(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def padded_rank(rank: int) -> int:
    """Return 0, or the power of two from 16 on that a matrix product takes for a rank."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


def seconds(op: str, config: MatmulConfig, device: Device, m: int, n: int, k: int) -> float:
    """Return the modelled time of a launch of "matmul" or "matmul_small"."""
    fit = FITS[op]
    programs = -(-m // config.block_m) * -(-n // config.block_n) * config.split_k
    a_multiprocessor = -(-programs // device.sms)
    steps = -(-(k // 64) // config.split_k)
    together = max(1, min(a_multiprocessor, fit.together * 4 // config.num_warps))
    cycles = max(config.cycles / fit.efficiency, fit.latency / together)
    compute = a_multiprocessor * steps * cycles / device.clock
    moved = weight_bytes(n, k) + 2 * (m * k + m * n)
    launch = fit.launch
    if config.split_k > 1:
        moved += 8 * config.split_k * m * n / _CACHE
        launch += SPLIT_SECONDS
    return launch + max(moved / device.bandwidth, compute)


def ranked(op: str, m: int, n: int, k: int, device: torch.device) -> list[MatmulConfig]:
    """Return the cuts of "matmul" or "matmul_small" on a device, the most promising first.

    Of matmul that is what the model says. matmul_small waits for loads, which the model does not
    see: it wants programs enough to fill a GPU about twice, and no more.
    """
    model = device_of(device)
    splits = _splits(k, device)
    if op == "matmul_small":
        tile = next(c for c in MATMUL_SMALL if m <= c.block_m)
        if tile == MATMUL_SMALL[-1]:
            return [tile]
        programs = -(-n // tile.block_n)
        wanted = model.sms * (1.85 if tile.block_m == SMALL_M else 1.6)
        splits = sorted(splits, key=lambda s: (programs * s < wanted, abs(programs * s - wanted)))
        return [replace(tile, split_k=s) for s in splits]
    cuts = [replace(config, split_k=s) for config in _tiles(device) for s in splits]
    return sorted(cuts, key=lambda config: seconds(op, config, model, m, n, k))


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


@forgettable
@lru_cache(maxsize=4096)
def matmul_config(m: int, n: int, k: int, device: torch.device) -> MatmulConfig:
    """Return how `matmul` cuts a product of these sizes on a device."""
    return _best("matmul", m, n, k, device)


@forgettable
@lru_cache(maxsize=4096)
def matmul_small_config(m: int, n: int, k: int, device: torch.device) -> MatmulConfig:
    """Return how `matmul_small` cuts a product of these sizes on a device."""
    return _best("matmul_small", m, n, k, device)


def most_small_rows(n: int, device: torch.device) -> int:
    """Return how many rows `matmul_small` takes on a device with W of N rows.

    Its widest tile, which has no registers to split K, only where whole columns fill the GPU.
    """
    if not has_wgmma(device):
        return SMALL_M
    widest = MATMUL_SMALL[-1]
    fills = -(-n // widest.block_n) >= 0.75 * device_of(device).sms
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
    return widest.block_m if fills and hopper else MATMUL_SMALL[-2].block_m


def _tiles(device: torch.device) -> tuple[MatmulConfig, ...]:
    if is_amd(device):
        return MATMUL_MFMA
    return MATMUL if has_wgmma(device) else MATMUL_MMA


@forgettable
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
