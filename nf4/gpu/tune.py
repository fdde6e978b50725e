"""Measure which kernel and which tile is fastest on the GPU at hand, and keep it for later runs.

For a weight ``[N, K]`` and powers of two of rows: the cuts of the fused kernels that the model
likes best, against dequantize and the library's product. See kernels/_measured.py for the file.
"""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear as library_linear

from nf4.codebook import ABSMAX_BLOCK_SIZE
from nf4.gpu import plan
from nf4.gpu.linear import dense_scratch
from nf4.kernels import _configs, _measured, matmul, matmul_small
from nf4.kernels.dequantize import dequantize
from nf4.tensor import Weight, fits_fragments
from nf4.tools.caches import forget
from nf4.tools.cost import device_of
from nf4.tools.paths import write_file
from nf4.tools.shapes import MODELS, parse_shape
from nf4.tools.terms import PLAIN_SUMS

SHAPES = [shape for shapes in MODELS.values() for shape in shapes]
BLOCK_SIZE = 64
ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CUTS = 4  # of a kernel, those that the model likes best
PREPARE = {"matmul": matmul.prepare, "matmul_small": matmul_small.prepare}
Clock = Callable[[Callable[[], Any]], float]


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return shapes given as ``"4096x4096"``.

    Raises:
        ValueError: a text is no shape, or one that does not fit fragments.
    """
    shapes = [parse_shape(text) for text in texts]
    for text, shape in zip(texts, shapes, strict=True):
        if not fits_fragments(torch.Size(shape), BLOCK_SIZE):
            raise ValueError(f"shapes: expected N a multiple of 16 and K of 64, got {text}")
    return shapes


def find_gpu() -> torch.device:
    """Return the current GPU.

    Raises:
        ValueError: there is none, or none with kernels that multiply.
    """
    if not torch.cuda.is_available():
        raise ValueError("expected a GPU to measure on, found none")
    device = torch.device("cuda", torch.cuda.current_device())
    if not plan.has_matrix_kernels(device):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"expected a GPU with 16-bit tensor cores, found {name}")
    return device


def gpu_seconds(function: Callable[[], Any]) -> float:
    """Return the median time of a call on the GPU, the cache cleared before each."""
    milliseconds: float = triton.testing.do_bench(function, warmup=5, rep=20, return_mode="median")
    return 1e-3 * milliseconds


def tune(
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    progress: Callable[[str], None] = lambda name: None,
    clock: Clock = gpu_seconds,
) -> Path:
    """Measure, and write the file that later runs read.

    Args:
        shapes: of W, ``[N, K]``, each fit for fragments.
        device: a GPU, see `find_gpu`.
        progress: called with a name after each shape.
        clock: returns the seconds of a call.

    Returns:
        The file.

    Raises:
        OSError: the file cannot be written.
    """
    limits, tiles = [], []
    for n, k in shapes:
        limit, rows = _tune_shape(n, k, device, clock)
        limits.append([n, k, limit])
        tiles += rows
        progress(f"{n}×{k}")
    name = device_of(device).name
    path: Path = _measured.file_of(name)
    if path.is_file():  # what was measured on other weights stays
        earlier = json.loads(path.read_text(encoding="utf-8"))
        limits = [row for row in earlier["fused_limits"] if (row[0], row[1]) not in shapes] + limits
        tiles = [row for row in earlier["tiles"] if (row[2], row[3]) not in shapes] + tiles
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "fused_limits": limits,
        "tiles": tiles,
    }
    write_file(path, json.dumps(found, indent=1) + "\n")
    forget()
    return path


def _tune_shape(
    n: int, k: int, device: torch.device, clock: Clock
) -> tuple[int, list[list[object]]]:
    """Return the rows up to which the fused kernel is faster, and the fastest cuts."""
    weight = _random_weight(n, k, device)
    limit, tiles = _configs.SMALL_M, []
    for m in ROWS:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device)

        def library(x: Tensor = x) -> Tensor:
            return library_linear(x, dequantize(weight, x.dtype, dense_scratch(weight, x.dtype)))

        small = m <= _configs.most_small_rows(n, device)
        ops = ("matmul_small", "matmul") if small else ("matmul",)
        times = []
        for op in ops:
            best, seconds = _fastest(op, x, weight, clock)
            tiles.append([op, m, n, k, best.block_m, best.block_n, best.split_k, 1e6 * seconds])
            times.append(seconds)
        if m > _configs.SMALL_M:
            if times[0] >= clock(library):  # of what the plan takes
                break
            limit = m
    return limit, tiles


def _launch(op: str, cut: _configs.MatmulConfig, x: Tensor, weight: Weight) -> Tensor:
    """Multiply by one of the fused kernels, cut in one way."""
    y, form, arguments = PREPARE[op](cut, x, weight, PLAIN_SUMS)
    form(*arguments)
    return y


def _fastest(
    op: str, x: Tensor, weight: Weight, clock: Clock
) -> tuple[_configs.MatmulConfig, float]:
    """Return the fastest of the cuts of a kernel that the model likes best, and its time."""
    n, k = weight.shape
    cuts = _configs.ranked(op, len(x), n, k, x.device)[:CUTS]
    times = [clock(partial(_launch, op, cut, x, weight)) for cut in cuts]
    best = min(range(len(cuts)), key=times.__getitem__)
    return cuts[best], times[best]


def _random_weight(n: int, k: int, device: torch.device) -> Weight:
    """Return a random weight in fragments."""
    blocks = n * k // BLOCK_SIZE
    packed = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=device)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
    absmax2 = torch.rand(-(-blocks // ABSMAX_BLOCK_SIZE), device=device)
    scales = (absmax, absmax2, torch.ones((), device=device))
    return Weight(packed, *scales, (n, k), BLOCK_SIZE, "fragments")
