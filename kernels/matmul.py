"""Multiply by a weight in fragments, one launch: y = f * (x @ W.T + scaling * t @ lora_B.T + bias).

The transposed product W @ x.T is taken, so that tensor cores read W from the registers it is
decoded in; x goes through shared memory. W is rounded to the dtype of x as level times scale, once;
sums are in fp32; y is rounded once. Few programs split K between them: each leaves its sums in
scratch, and the one that finishes last adds them up in a fixed order, so that the result is always
the same. Reads 0.516 bytes a weight (block 64, double quantization) for every BLOCK_M rows of x,
and computes 2 flops a weight and row.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ..tensor import Weight
from ..tools.terms import PLAIN_SUMS, Epilogue
from ._aot import Variant
from ._configs import (
    MATMUL,
    MATMUL_MFMA,
    MATMUL_MMA,
    MFMA,
    MMA,
    WGMMA,
    MatmulConfig,
    matmul_config,
)
from ._fragments import as_words, decode_tile, load_scales
from ._product import Prepared, ProductForm, add_parts, finish, prepare_product, product_form


@triton.jit
def _matmul_kernel(
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
    BLOCK_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,  # whether the blocks of a row are whole groups of four
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least 16 a warp
    SPLIT_K: tl.constexpr,
    RANK: tl.constexpr,  # 0, or rank rounded up to a power of two from 16
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    pid, pid_k = tl.program_id(0), tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_n, pid_m = pid % tiles_n, pid // tiles_n
    # Rows beyond the end repeat the last one; what comes of them is not stored.
    offs_m = tl.minimum(pid_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    offs_n = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    offs_k = tl.arange(0, 64)
    tiles = tl.minimum(pid_n * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16), N // 16 - 1)
    steps = K // 64
    word_ptrs = as_words(words_ptr) + tiles.to(tl.int64)[:, None] * (steps * 128)
    word_ptrs += tl.arange(0, 128)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * K + offs_k[:, None]
    columns = K // BLOCK_SIZE
    offset = 0.0
    if absmax_ptr.dtype.element_ty == tl.uint8:
        offset = tl.load(offset_ptr)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in tl.range(steps * pid_k // SPLIT_K, steps * (pid_k + 1) // SPLIT_K):
        words = tl.load(word_ptrs + step * 128)  # [BLOCK_N / 16, 128]
        column = step * 64 // BLOCK_SIZE
        scale0 = load_scales(
            absmax_ptr, absmax2_ptr, map_ptr, offset, offs_n, column, columns, N, WHOLE
        )  # [BLOCK_N]
        scale1 = scale0
        if BLOCK_SIZE == 32:
            scale1 = load_scales(
                absmax_ptr, absmax2_ptr, map_ptr, offset, offs_n, column + 1, columns, N, WHOLE
            )
        x = tl.load(x_ptrs + step * 64)  # [64, BLOCK_M]
        w = decode_tile(words, scale0, scale1, levels_ptr, BLOCK_N, x_ptr.dtype.element_ty, SHUFFLE)
        acc = tl.dot(w, x, acc)
    mask = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M) < M)[None, :]
    acc, is_last = add_parts(
        acc, parts_ptr, arrived_ptr, pid, tl.num_programs(0), pid_k, mask, SPLIT_K
    )
    if is_last:
        finish(
            acc,
            t_ptr,
            lora_B_ptr,
            bias_ptr,
            factor_ptr,
            y_ptr,
            pid_m * BLOCK_M,
            pid_n * BLOCK_N,
            M,
            N,
            rank,
            scaling,
            RANK,
            HAS_BIAS,
            HAS_FACTOR,
        )


def matmul(x: Tensor, weight: Weight, epilogue: Epilogue = PLAIN_SUMS) -> Tensor:
    """Multiply by a weight in fragments; arguments as in nf4/reference/matmul.py."""
    config = matmul_config(x.shape[0], *weight.shape, x.device)
    y, form, arguments = prepare(config, x, weight, epilogue)
    form(*arguments)
    return y


def prepare(config: MatmulConfig, x: Tensor, weight: Weight, epilogue: Epilogue) -> Prepared:
    """Return y, and what fills it, cut as config says."""
    tiles = -(-x.shape[0] // config.block_m) * -(-weight.shape[0] // config.block_n)
    return prepare_product(_matmul_kernel, config, tiles, x, weight, epilogue)


def variants() -> list[Variant]:
    """Return the compilations to report on: every tile where it may be chosen, and its extremes."""

    def variant(
        config: MatmulConfig, targets: tuple[str, ...], rank: int, name: str = ""
    ) -> Variant:
        split = replace(config, split_k=1 if config.block_n == 128 else 4)
        form = ProductForm(64, 4, True, True, rank, rank > 0, rank == 256)
        return Variant(
            f"matmul, {config.block_m}×{config.block_n}, rank {rank}{name}",
            product_form(_matmul_kernel, split, form),
            config.block_n * 64,
            indivisible=("M", "rank"),
            targets=targets,
        )

    made = [variant(config, WGMMA, 16) for config in MATMUL]
    made += [variant(MATMUL[-1], WGMMA, rank) for rank in (0, 256)]
    made += [variant(config, MMA, 16, ", mma") for config in MATMUL_MMA]
    made += [variant(config, MFMA, 16, ", mfma") for config in MATMUL_MFMA]
    return made
