"""Write a weight in fragments out as a dense matrix, with a low-rank update added or without.

    out[n, k] = round(levels[code[n, k]] * absmax + scaling * sum over r: B[n, r] * A[r, k])

Products of B and A are summed by tensor cores in fp32, in the places where the levels are decoded,
onto them where scaling is a power of two; there is one rounding. Moves 0.516 bytes in and 2 out an
element (bf16, block 64, double quantization), and B and A once a tile.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import absmax_map, nf4_levels
from ..tensor import Weight
from ..tools.caches import forgettable
from ..tools.terms import LowRank
from ._aot import Variant
from ._configs import MATRIX, padded_rank
from ._fragments import as_words, decode_scales, decode_tile, load_codes, load_group, load_map
from ._launch import Launch, aligned

ROWS = 64
TILES = 4  # of 64 columns a program


@triton.jit
def _load_b(lora_B_ptr, offs_n, offs_r, rank, scaling, DTYPE: tl.constexpr, FOLD: tl.constexpr):
    """Return B at some rows, rounded, and with FOLD times scaling: ``[rows, ranks]``."""
    b_ptrs = lora_B_ptr + offs_n.to(tl.int64)[:, None] * rank + offs_r[None, :]
    b = tl.load(b_ptrs, mask=(offs_r < rank)[None, :], other=0.0)
    if FOLD:
        b = b.to(tl.float32) * scaling
    return b.to(DTYPE)


@triton.jit
def _load_a(lora_A_ptr, offs_r, offs_k, K, rank, DTYPE: tl.constexpr):
    """Return A at some columns, rounded: ``[ranks, columns]``."""
    a = tl.load(
        lora_A_ptr + offs_r[:, None] * K + offs_k[None, :], mask=(offs_r < rank)[:, None], other=0.0
    )
    return a.to(DTYPE)


@triton.jit
def merge_kernel(
    words_ptr,  # int32 [N / 16, K / 64, 128], or their bytes
    absmax_ptr,  # float32 [K / BLOCK_SIZE * N] by groups of four columns, or uint8 codes
    absmax2_ptr,  # float32 [ceil(blocks / 256)]
    offset_ptr,  # float32 []
    map_ptr,  # float32 [256]
    levels_ptr,  # float32 [16]
    lora_A_ptr,  # float [rank, K], rounded to the dtype of out
    lora_B_ptr,  # float [N, rank], likewise
    out_ptr,  # [N, K]
    N,
    K,
    rank,
    scaling,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    RANK: tl.constexpr,  # 0, or rank rounded up to a power of two from 16
    GROUPED: tl.constexpr,  # whether a program's blocks are a group of four codes a row
    FOLD: tl.constexpr,  # whether B may be multiplied by scaling before it is rounded
    SHUFFLE: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    HALVES: tl.constexpr = 2 if BLOCK_SIZE == 32 else 1  # of a tile, with scales of their own
    STEP: tl.constexpr = min(RANK, 64)  # of the rank at a time
    first_tile, pid_n = tl.program_id(0) * TILES, tl.program_id(1)
    rows = pid_n * ROWS + tl.arange(0, ROWS)  # [ROWS]
    mask_n = rows < N
    offs_n = tl.minimum(rows, N - 1)
    row_tiles = tl.minimum(pid_n * (ROWS // 16) + tl.arange(0, ROWS // 16), N // 16 - 1)
    word_ptrs = as_words(words_ptr) + row_tiles.to(tl.int64)[:, None] * (K // 64 * 128)
    word_ptrs += tl.arange(0, 128)[None, :]
    # Every load before the first decode: the scales are three loads that wait for each other
    codes, words, scales = (), (), ()
    if GROUPED:
        group = load_group(absmax_ptr, offs_n, tl.program_id(0), N)
        absmax2 = tl.load(absmax2_ptr + ((offs_n * (K // 64) + first_tile) >> 8))
    for u in tl.static_range(TILES):
        tile = tl.minimum(first_tile + u, K // 64 - 1)  # the last may be written twice
        if not GROUPED:
            for half in tl.static_range(HALVES):
                column = tile * 64 // BLOCK_SIZE + half
                columns = K // BLOCK_SIZE
                found = load_codes(absmax_ptr, absmax2_ptr, offs_n, column, columns, N, False)
                codes = codes + (found,)
        words = words + (tl.load(word_ptrs + tile * 128),)  # [ROWS / 16, 128]
    offset = 0.0
    if absmax_ptr.dtype.element_ty == tl.uint8:
        offset = tl.load(offset_ptr)
    if RANK > 0:
        offs_r = tl.arange(0, STEP)
        b = _load_b(lora_B_ptr, offs_n, offs_r, rank, scaling, DTYPE, FOLD)
    for i in tl.static_range(TILES * HALVES):
        if GROUPED:
            scales = scales + (load_map(map_ptr, group, i) * absmax2 + offset,)
        else:
            scales = scales + (decode_scales(codes[i], map_ptr, offset),)
    for u in tl.static_range(TILES):
        scale0, scale1 = scales[u * HALVES], scales[u * HALVES + HALVES - 1]
        out = decode_tile(words[u], scale0, scale1, levels_ptr, ROWS, tl.float32, SHUFFLE)
        offs_k = tl.minimum(first_tile + u, K // 64 - 1) * 64 + tl.arange(0, 64)
        if RANK > 0:
            acc = out if FOLD else tl.zeros_like(out)
            acc = tl.dot(b, _load_a(lora_A_ptr, offs_r, offs_k, K, rank, DTYPE), acc)
            for first in tl.range(STEP, RANK, STEP, num_stages=1):
                more_b = _load_b(lora_B_ptr, offs_n, first + offs_r, rank, scaling, DTYPE, FOLD)
                more_a = _load_a(lora_A_ptr, first + offs_r, offs_k, K, rank, DTYPE)
                acc = tl.dot(more_b, more_a, acc)
            out = acc if FOLD else out + scaling * acc
        out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        tl.store(out_ptrs, out.to(DTYPE), mask=mask_n[:, None])


def dense_launch(
    weight: Weight, low_rank: LowRank | None, out: Tensor
) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return what fills out, contiguous ``[N, K]``, and its arguments.

    With a low-rank update out is 16 bits wide.
    """
    n, k = out.shape
    packed, absmax, absmax2, offset, _, block_size, _ = weight
    lora_A, lora_B, scaling, _ = (None, None, 1.0, None) if low_rank is None else low_rank
    rank = 0 if lora_A is None else lora_A.shape[0]
    grid = (-(-k // (64 * TILES)), -(-n // ROWS))
    tables = (absmax_map(out.device), nf4_levels(out.device))
    parts = (aligned(packed), aligned(absmax), absmax2, offset, *tables)
    grouped = absmax.dtype == torch.uint8 and block_size == 64 and k % (64 * TILES) == 0
    form = _form(block_size, padded_rank(rank), grouped, _folds(scaling, out.dtype))
    return form, (grid, *parts, lora_A, lora_B, out, n, k, rank, scaling)


def _folds(scaling: float, dtype: torch.dtype) -> bool:
    """Return whether scaling times B, rounded, is scaling times B rounded: a power of two.

    Then products are added onto the weight as it is decoded. float16 has few exponents: there only
    where nothing is scaled.
    """
    if dtype == torch.bfloat16:
        return abs(math.frexp(scaling)[0]) == 0.5 and 2.0**-20 <= abs(scaling) <= 2.0**20
    return scaling == 1


@forgettable
@lru_cache
def _form(block_size: int, padded: int, grouped: bool, folds: bool) -> Launch:
    constants = {
        "BLOCK_SIZE": block_size,
        "ROWS": ROWS,
        "TILES": TILES,
        "RANK": padded,
        "GROUPED": grouped,
        "FOLD": folds,
    }
    return Launch(merge_kernel, constants)


def merge_variants(name: str, ranks: tuple[int, ...], dtype: str = "bf16") -> list[Variant]:
    """Return compilations of the kernel to report on."""
    return [
        Variant(
            f"{name}, {dtype}" + (f", rank {rank}" if rank else ""),
            _form(64, rank, True, True),
            ROWS * TILES * 64,
            {"out_ptr": f"*{dtype}"},
            targets=MATRIX,
        )
        for rank in ranks
    ]
