"""Multiply up to 128 rows by fragments of W: y = f * (x @ W.T + scaling * t @ lora_B.T + bias).

Of few rows the product is bound by the bytes of W: decoding has 3.5 instructions a weight. Levels
are rounded to the dtype of x and multiplied as they are; the sum of each block is then scaled in
fp32, and y is rounded once. Where a step's blocks are a group of four codes, scales are loaded
ahead of their use. Programs split K as in kernels/matmul.py. Reads 0.516 bytes a weight (block 64,
double quantization).
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ..tensor import Weight
from ..tools.terms import PLAIN_SUMS, Epilogue
from ._aot import Variant
from ._configs import MATMUL_SMALL, MATRIX, SMALL_M, WGMMA, MatmulConfig, matmul_small_config
from ._fragments import as_words, load_group, load_group_scales, load_scales
from ._levels16 import decode_levels
from ._product import Prepared, ProductForm, add_parts, finish, prepare_product, product_form


@triton.jit
def _levels_tile(pairs, ROWS: tl.constexpr):
    """Arrange four tensors ``[tiles, g, t, r, h, e]``, i = 2j + c, as ``[ROWS, 64]``."""
    joined = tl.join(tl.join(pairs[0], pairs[1]), tl.join(pairs[2], pairs[3]))  # [..., e, c, j]
    return tl.permute(joined, (0, 3, 1, 4, 7, 6, 2, 5)).reshape([ROWS, 64])


@triton.jit
def _product(words, scale, x, acc, levels_ptr, ROWS: tl.constexpr, SHUFFLE: tl.constexpr):
    """Return acc plus the product of one tile of 64 columns, its sums times the rows' scales."""
    words = words.reshape([ROWS // 16, 8, 4, 2, 2])
    pairs = decode_levels(words, levels_ptr, x.dtype, SHUFFLE)
    part = tl.dot(_levels_tile(pairs, ROWS), x)
    return tl.fma(part, tl.broadcast_to(scale[:, None], acc.shape), acc)


@triton.jit
def _matmul_small_kernel(
    x_ptr,  # float16 or bfloat16 [M, K]
    words_ptr,  # int32 [N / 16, K / 64, 128], or their bytes
    absmax_ptr,  # float32 [K / BLOCK_SIZE * N] by groups of four columns, or uint8 codes
    absmax2_ptr,  # float32 [ceil(blocks / 256)]
    offset_ptr,  # float32 []
    map_ptr,  # float32 [256]
    levels_ptr,  # float32 [16]
    t_ptr,  # dtype of x [M, rank]
    lora_B_ptr,  # dtype of x [N, rank]
    bias_ptr,  # float [N]
    factor_ptr,  # float [N]
    y_ptr,  # dtype of x [M, N]
    parts_ptr,  # float32 [SPLIT_K, tiles, BLOCK_N * BLOCK_M]
    arrived_ptr,  # int32 [tiles], zeros before and after
    M,
    N,
    K,
    rank,
    scaling,
    BLOCK_SIZE: tl.constexpr,  # at least 64
    BLOCK_M: tl.constexpr,  # at least M
    BLOCK_N: tl.constexpr,  # at least 16 a warp
    UNROLL: tl.constexpr,  # tiles of 64 columns a step
    GROUPED: tl.constexpr,  # whether a step's blocks are a group of four codes a row
    SPLIT_K: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    offs_m = tl.minimum(tl.arange(0, BLOCK_M), M - 1)
    offs_n = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    tiles = tl.minimum(pid_n * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16), N // 16 - 1)
    all_tiles = K // 64
    word_ptrs = as_words(words_ptr) + tiles.to(tl.int64)[:, None] * (all_tiles * 128)
    word_ptrs += tl.arange(0, 128)[None, :]
    x_ptrs = x_ptr + offs_m[None, :] * K + tl.arange(0, 64)[:, None]
    offset = 0.0
    if absmax_ptr.dtype.element_ty == tl.uint8:
        offset = tl.load(offset_ptr)
    steps = all_tiles // UNROLL
    begin, end = steps * pid_k // SPLIT_K, steps * (pid_k + 1) // SPLIT_K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if GROUPED:
        # The map's entries come a step ahead of the product, and the codes that pick them two. The
        # widest tile has no registers for that: its codes come a step ahead
        AHEAD: tl.constexpr = 1 if BLOCK_M < 128 else 0
        last = end - 1
        codes = load_group(absmax_ptr, offs_n, begin, N)
        if AHEAD:
            scales = load_group_scales(absmax2_ptr, map_ptr, offset, offs_n, codes, begin, K)
            codes = load_group(absmax_ptr, offs_n, tl.minimum(begin + 1, last), N)
        for step in tl.range(begin, end):
            following = tl.minimum(step + AHEAD, last)
            next_scales = load_group_scales(
                absmax2_ptr, map_ptr, offset, offs_n, codes, following, K
            )
            codes = load_group(absmax_ptr, offs_n, tl.minimum(step + 1 + AHEAD, last), N)
            if not AHEAD:
                scales = next_scales
            for u in tl.static_range(4):
                words = tl.load(word_ptrs + step * 512 + u * 128)  # [BLOCK_N / 16, 128]
                x = tl.load(x_ptrs + step * 256 + u * 64)  # [64, BLOCK_M]
                acc = _product(words, scales[u], x, acc, levels_ptr, BLOCK_N, SHUFFLE)
            if AHEAD:
                scales = next_scales
    else:
        for step in tl.range(begin, end):
            for u in tl.static_range(UNROLL):
                tile = step * UNROLL + u
                words = tl.load(word_ptrs + tile * 128)
                column, columns = tile * 64 // BLOCK_SIZE, K // BLOCK_SIZE
                scale = load_scales(
                    absmax_ptr, absmax2_ptr, map_ptr, offset, offs_n, column, columns, N, False
                )  # [BLOCK_N]
                x = tl.load(x_ptrs + tile * 64)
                acc = _product(words, scale, x, acc, levels_ptr, BLOCK_N, SHUFFLE)
    mask = (tl.arange(0, BLOCK_M) < M)[None, :]
    acc, is_last = add_parts(
        acc, parts_ptr, arrived_ptr, pid_n, tl.num_programs(0), pid_k, mask, SPLIT_K
    )
    if is_last:
        finish(
            acc,
            t_ptr,
            lora_B_ptr,
            bias_ptr,
            factor_ptr,
            y_ptr,
            0,
            pid_n * BLOCK_N,
            M,
            N,
            rank,
            scaling,
            RANK,
            HAS_BIAS,
            HAS_FACTOR,
        )


def matmul_small(x: Tensor, weight: Weight, epilogue: Epilogue = PLAIN_SUMS) -> Tensor:
    """Multiply few rows; arguments as in nf4/reference/matmul.py, block_size at least 64."""
    config = matmul_small_config(x.shape[0], *weight.shape, x.device)
    y, form, arguments = prepare(config, x, weight, epilogue)
    form(*arguments)
    return y


def prepare(config: MatmulConfig, x: Tensor, weight: Weight, epilogue: Epilogue) -> Prepared:
    """Return y, and what fills it, cut as config says."""
    tiles = -(-weight.shape[0] // config.block_n)
    return prepare_product(_matmul_small_kernel, config, tiles, x, weight, epilogue)


def variants() -> list[Variant]:
    """Return the compilations to report on: every tile, split and whole."""

    def variant(config: MatmulConfig, unroll: int, split_k: int, rank: int) -> Variant:
        widest = config == MATMUL_SMALL[-1]
        targets, split_k = (("sm_90",), 1) if widest else (WGMMA, split_k)
        ends = (rank > 0, unroll == 1)
        split = replace(config, split_k=split_k)
        form = ProductForm(64, unroll, unroll == 4, True, rank, *ends)
        return Variant(
            f"matmul_small, {config.block_m}×{config.block_n}, unrolled {unroll}, "
            f"split {split_k}, rank {rank}",
            product_form(_matmul_small_kernel, split, form),
            config.block_n * 64 * unroll,
            indivisible=("M", "rank"),
            targets=MATRIX if config.block_m == SMALL_M else targets,
        )

    made = [variant(config, 4, 1, 0) for config in MATMUL_SMALL]
    made += [variant(config, 4, 4, 16) for config in MATMUL_SMALL]
    return [*made, variant(MATMUL_SMALL[0], 1, 4, 16)]
