"""Write a weight in fragments out as a dense matrix, with a low-rank update added or without.

    out[n, k] = round(levels[code[n, k]] * absmax + scaling * sum over r: B[n, r] * A[r, k])

Products of B and A are summed by tensor cores in fp32, in the places where the levels are decoded;
there is one rounding. Moves 0.516 bytes in and 2 out an element (bf16, block 64, double
quantization), and B and A once a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import absmax_map, nf4_levels
from . import _lanes
from ._aot import Variant
from ._configs import MATRIX, padded_rank
from ._fragments import decode_tile, load_scales

ROWS = 64
TILES = 4  # of 64 columns a program


@triton.jit
def _update(
    lora_A_ptr,
    lora_B_ptr,
    offs_n,
    offs_k,
    K,
    rank,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
):
    """Return B @ A at some rows and columns, fp32; at most 64 of the rank at a time."""
    STEP: tl.constexpr = min(RANK, 64)
    acc = tl.zeros([offs_n.shape[0], offs_k.shape[0]], tl.float32)
    for first in tl.range(0, RANK, STEP, num_stages=1):
        offs_r = first + tl.arange(0, STEP)
        b_ptrs = lora_B_ptr + offs_n.to(tl.int64)[:, None] * rank + offs_r[None, :]
        b = tl.load(b_ptrs, mask=(offs_r < rank)[None, :], other=0.0)
        a_ptrs = lora_A_ptr + offs_r[:, None] * K + offs_k[None, :]
        a = tl.load(a_ptrs, mask=(offs_r < rank)[:, None], other=0.0)
        acc = tl.dot(b.to(DTYPE), a.to(DTYPE), acc)
    return acc


@triton.jit
def merge_kernel(
    words_ptr,  # int32 [N / 16, K / 64, 128]
    absmax_ptr,  # float32 [K / BLOCK_SIZE, N], or uint8 codes
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
    SHUFFLE: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    first_tile, pid_n = tl.program_id(0) * TILES, tl.program_id(1)
    rows = pid_n * ROWS + tl.arange(0, ROWS)  # [ROWS]
    mask_n = rows < N
    offs_n = tl.minimum(rows, N - 1)
    row_tiles = tl.minimum(pid_n * (ROWS // 16) + tl.arange(0, ROWS // 16), N // 16 - 1)
    word_ptrs = words_ptr + row_tiles.to(tl.int64)[:, None] * (K // 64 * 128)
    word_ptrs += tl.arange(0, 128)[None, :]
    offset = 0.0
    if absmax_ptr.dtype.element_ty == tl.uint8:
        offset = tl.load(offset_ptr)
    scale_ptrs, first_blocks = absmax_ptr + offs_n, offs_n * (K // BLOCK_SIZE)
    for u in tl.static_range(TILES):
        tile = tl.minimum(first_tile + u, K // 64 - 1)  # the last may be written twice
        words = tl.load(word_ptrs + tile * 128)  # [ROWS / 16, 128]
        column = tile * 64 // BLOCK_SIZE
        scale0 = load_scales(scale_ptrs, absmax2_ptr, map_ptr, offset, first_blocks, column, N)
        scale1 = scale0
        if BLOCK_SIZE == 32:
            scale1 = load_scales(
                scale_ptrs, absmax2_ptr, map_ptr, offset, first_blocks, column + 1, N
            )
        out = decode_tile(words, scale0, scale1, levels_ptr, ROWS, tl.float32, SHUFFLE)
        offs_k = tile * 64 + tl.arange(0, 64)
        if RANK > 0:
            out += scaling * _update(lora_A_ptr, lora_B_ptr, offs_n, offs_k, K, rank, DTYPE, RANK)
        out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        tl.store(out_ptrs, out.to(DTYPE), mask=mask_n[:, None])


def write_dense(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    block_size: int,
    out: Tensor,
) -> None:
    """Fill out, contiguous ``[N, K]``, 16 bits wide if there are lora_A and lora_B."""
    n, k = out.shape
    rank = 0 if lora_A is None else lora_A.shape[0]
    merge_kernel[(-(-k // (64 * TILES)), -(-n // ROWS))](
        packed.view(-1).view(torch.int32),
        absmax,
        out if absmax2 is None else absmax2,
        out if offset is None else offset,
        absmax_map(out.device),
        nf4_levels(out.device),
        out if lora_A is None else lora_A,
        out if lora_B is None else lora_B,
        out,
        n,
        k,
        rank,
        scaling,
        BLOCK_SIZE=block_size,
        ROWS=ROWS,
        TILES=TILES,
        RANK=padded_rank(rank),
        SHUFFLE=_lanes.has_shuffle(out),
        num_warps=4,
        enable_fp_fusion=False,
    )


def merge_variants(name: str, ranks: tuple[int, ...], dtype: str = "bf16") -> list[Variant]:
    """Return compilations of the kernel to report on."""
    signature = {
        "words_ptr": "*i32",
        "absmax_ptr": "*u8",
        "absmax2_ptr": "*fp32",
        "offset_ptr": "*fp32",
        "map_ptr": "*fp32",
        "levels_ptr": "*fp32",
        "lora_A_ptr": "*fp32",
        "lora_B_ptr": "*fp32",
        "out_ptr": f"*{dtype}",
        "N": "i32",
        "K": "i32",
        "rank": "i32",
        "scaling": "fp32",
    }
    return [
        Variant(
            f"{name}, {dtype}" + (f", rank {rank}" if rank else ""),
            merge_kernel,
            signature,
            {"BLOCK_SIZE": 64, "ROWS": ROWS, "TILES": TILES, "RANK": rank},
            ROWS * TILES * 64,
            targets=MATRIX,
        )
        for rank in ranks
    ]
