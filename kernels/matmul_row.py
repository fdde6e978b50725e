"""Multiply one or two rows by fragments of W on the plain cores: y = f * (x @ W.T + ... + bias).

Tensor cores would have to be fed through shared memory, and waited for. Here a warp owns 16 rows of
W and a share of K; nothing leaves its registers until the last sum, over the warps of a program.
Levels are fp32, scales meet the sums of blocks, y is rounded once. What a warp multiplies with it
loads in the layout of the words, by PTX, so that there is no barrier in the loop. For blocks of 64,
double quantization and K of whole groups of 256 columns; other weights go through
kernels/matmul_small.py. Reads 0.516 bytes a weight.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ..codebook import absmax_map, nf4_levels
from ..tensor import Weight
from ..tools.caches import forgettable
from ..tools.terms import PLAIN_SUMS, Epilogue
from ._aot import Variant
from ._configs import MMA, WGMMA, padded_rank
from ._fragments import as_words, decode_words
from ._launch import Launch, aligned

MOST_ROWS = 2  # of four, kernels/matmul_small.py is as fast
GROUP = 256  # columns of four blocks
SHARES = 8  # of K; swept on an H200 from 1024×4096 to 28672×8192
_LOAD = tl.constexpr("ld.global.nc.b32 $0, [$1];")
_PAIR_BF16 = tl.constexpr(
    "{ .reg .b32 v; ld.global.nc.b32 v, [$2]; shl.b32 $0, v, 16; and.b32 $1, v, 0xffff0000; }"
)
_PAIR_FP16 = tl.constexpr(
    "{ .reg .b32 v; .reg .b16 low, high; ld.global.nc.b32 v, [$2]; mov.b32 {low, high}, v; "
    "cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
)


@triton.jit
def _load(ptrs, SHUFFLE: tl.constexpr):
    """Load 32 bits for each pointer; by PTX in whatever layout the pointers have."""
    if SHUFFLE:
        word = tl.inline_asm_elementwise(
            _LOAD, "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
        return word.to(ptrs.dtype.element_ty, bitcast=True)
    else:
        return tl.load(ptrs)


@triton.jit
def _load_pair(ptrs, SHUFFLE: tl.constexpr):
    """Return the neighbours at each pointer, an even element and the next, in fp32."""
    if SHUFFLE:
        is_fp16: tl.constexpr = ptrs.dtype.element_ty.is_fp16()
        asm: tl.constexpr = _PAIR_FP16 if is_fp16 else _PAIR_BF16
        return tl.inline_asm_elementwise(
            asm,
            "=f,=f,l",
            [ptrs.to(tl.int64)],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(ptrs).to(tl.float32), tl.load(ptrs + 1).to(tl.float32)


@triton.jit
def _dot(levels, x_ptrs, SHUFFLE: tl.constexpr):
    """Return level times x, summed over the eight columns of a word and over both halves."""
    total = tl.zeros(levels[0].shape, tl.float32)
    for j in tl.static_range(4):
        x0, x1 = _load_pair(x_ptrs + 8 * j, SHUFFLE)
        total = tl.fma(levels[2 * j], tl.broadcast_to(x0, total.shape), total)
        total = tl.fma(levels[2 * j + 1], tl.broadcast_to(x1, total.shape), total)
    return tl.sum(total, axis=4)


@triton.jit
def _finish(
    acc,  # fp32 [16], x @ W.T of one row of x and 16 rows of W
    t_ptr,  # dtype of x [rank], of that row
    lora_B_ptr,
    bias_ptr,
    factor_ptr,
    y_ptr,
    offs_n,
    rank,
    scaling,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
):
    """Add scaling * t @ lora_B.T and bias, scale and store, rounded once."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    if RANK > 0:
        offs_r = tl.arange(0, RANK)
        t = tl.load(t_ptr + offs_r, mask=offs_r < rank, other=0.0).to(tl.float32)
        b_ptrs = lora_B_ptr + offs_n.to(tl.int64)[:, None] * rank + offs_r[None, :]
        b = tl.load(b_ptrs, mask=(offs_r < rank)[None, :], other=0.0)
        acc += scaling * tl.sum(b.to(DTYPE).to(tl.float32) * t[None, :], axis=1)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n).to(tl.float32)
    if HAS_FACTOR:
        acc *= tl.load(factor_ptr + offs_n).to(tl.float32)
    tl.store(y_ptr + offs_n, acc.to(DTYPE))


@triton.jit
def row_product(
    x_ptr,  # these as in _matmul_row_kernel
    words_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    map_ptr,
    levels_ptr,
    t_ptr,
    lora_B_ptr,
    bias_ptr,
    factor_ptr,
    y_ptr,
    first_row,  # of W, of 16
    N,
    K,
    rank,
    scaling,
    M: tl.constexpr,
    SHARES: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """Multiply rows of x by 16 rows of W, and store them."""
    # Tensors [SHARES, g, t, r, h], see nf4/reference/repack.py; those of rows have no h
    groups = K // 256
    shares = tl.arange(0, SHARES)
    begin = (groups * shares // SHARES)[:, None, None, None]
    end = (groups * (shares + 1) // SHARES)[:, None, None, None]
    g, r = tl.arange(0, 8)[None, :, None, None], tl.arange(0, 2)[None, None, None, :]
    rows = first_row + 8 * r + g  # [1, 8, 1, 2]
    t = tl.arange(0, 4)[None, None, :, None, None]
    h = tl.arange(0, 2)[None, None, None, None, :]
    x_ptrs = x_ptr + 32 * h + 2 * t  # [1, 1, 4, 1, 2]
    word_ptrs = as_words(words_ptr) + first_row.to(tl.int64) * (K // 8) + tl.arange(0, 128)[None, :]
    first_words = (groups * shares // SHARES)[:, None]
    code_ptrs = as_words(absmax_ptr) + rows
    offset = tl.load(offset_ptr)
    acc = ()
    for _ in tl.static_range(M):
        acc = acc + (tl.zeros([SHARES, 8, 4, 2], tl.float32),)
    codes = _load(code_ptrs + begin.to(tl.int64) * N, SHUFFLE)  # [SHARES, 8, 1, 2]
    for step in tl.range(0, STEPS, num_stages=1):
        group = begin + step  # of a share that is one short, at last the next share's
        following = tl.minimum(group + 1, groups - 1)
        absmax2 = _load(absmax2_ptr + ((rows * (K // 64) + 4 * group) >> 8), SHUFFLE)
        next_codes = _load(code_ptrs + following.to(tl.int64) * N, SHUFFLE)
        words, scales = (), ()
        for u in tl.static_range(4):
            at = (first_words + step) * 512 + 128 * u
            words = words + (tl.load(word_ptrs + at),)  # [SHARES, 128]
        for u in tl.static_range(4):
            entry = _load(map_ptr + ((codes >> (8 * u)) & 255), SHUFFLE)
            scales = scales + (entry * absmax2 + offset,)
        for u in tl.static_range(4):
            levels = decode_words(words[u].reshape([SHARES, 8, 4, 2, 2]), levels_ptr, SHUFFLE)
            columns = (256 * group + 64 * u)[:, :, :, :, None]
            added = ()
            for m in tl.static_range(M):
                part = _dot(levels, x_ptrs + (m * K + columns), SHUFFLE)
                if not EVEN:
                    part = tl.where(group < end, part, 0.0)
                added = added + (tl.fma(part, tl.broadcast_to(scales[u], part.shape), acc[m]),)
            acc = added
        codes = next_codes
    offs_n = first_row + tl.arange(0, 16)
    for m in tl.static_range(M):
        total = tl.sum(tl.sum(acc[m], axis=2), axis=0)  # [8, 2]
        _finish(
            tl.permute(total, (1, 0)).reshape([16]),
            t_ptr + m * rank,
            lora_B_ptr,
            bias_ptr,
            factor_ptr,
            y_ptr + m * N,
            offs_n,
            rank,
            scaling,
            RANK,
            HAS_BIAS,
            HAS_FACTOR,
        )


@triton.jit
def _matmul_row_kernel(
    x_ptr,  # float16 or bfloat16 [M, K]
    words_ptr,  # int32 [N / 16, K / 64, 128], or their bytes
    absmax_ptr,  # uint8 codes [K / 256, N, 4]
    absmax2_ptr,  # float32 [ceil(blocks / 256)]
    offset_ptr,  # float32 []
    map_ptr,  # float32 [256]
    levels_ptr,  # float32 [16]
    t_ptr,  # dtype of x [M, rank]
    lora_B_ptr,  # float [N, rank], rounded to the dtype of x
    bias_ptr,  # float [N]
    factor_ptr,  # float [N]
    y_ptr,  # dtype of x [M, N]
    N,
    K,
    rank,
    scaling,
    M: tl.constexpr,
    SHARES: tl.constexpr,  # of K, one a warp
    STEPS: tl.constexpr,  # groups of 256 columns that a share has at most
    EVEN: tl.constexpr,  # whether all shares have as many
    RANK: tl.constexpr,  # 0, or rank rounded up to a power of two from 16
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    row_product(
        x_ptr,
        words_ptr,
        absmax_ptr,
        absmax2_ptr,
        offset_ptr,
        map_ptr,
        levels_ptr,
        t_ptr,
        lora_B_ptr,
        bias_ptr,
        factor_ptr,
        y_ptr,
        tl.program_id(0) * 16,
        N,
        K,
        rank,
        scaling,
        M,
        SHARES,
        STEPS,
        EVEN,
        RANK,
        HAS_BIAS,
        HAS_FACTOR,
        SHUFFLE,
    )


def takes(k: int, block_size: int) -> bool:
    """Return whether the kernel takes double-quantized weights of K columns."""
    return k % GROUP == 0 and block_size == 64


def matmul_row(x: Tensor, weight: Weight, epilogue: Epilogue = PLAIN_SUMS) -> Tensor:
    """Multiply rows by a weight that the kernel `takes`; as nf4/reference/matmul_row.py."""
    (m, k), n, device = x.shape, weight.shape[0], x.device
    bias, t, lora_B, scaling, factor = epilogue
    y = x.new_empty(m, n)
    if m == 0:
        return y
    rank = 0 if t is None else t.shape[1]
    form = _form(m, k, padded_rank(rank), bias is not None, factor is not None)
    tables = (absmax_map(device), nf4_levels(device))
    parts = (aligned(weight.packed), aligned(weight.absmax), weight.absmax2, weight.offset)
    terms = (t, lora_B, bias, factor)
    form((n // 16,), aligned(x), *parts, *tables, *terms, y, n, k, rank, scaling)
    return y


def cut(k: int) -> dict[str, int]:
    """Return how K is cut, by the kernel's constants."""
    groups = k // GROUP
    shares = min(SHARES, 1 << (groups.bit_length() - 1))
    return {"SHARES": shares, "STEPS": -(-groups // shares), "EVEN": groups % shares == 0}


@forgettable
@lru_cache
def _form(m: int, k: int, padded: int, has_bias: bool, has_factor: bool) -> Launch:
    ends = {"RANK": padded, "HAS_BIAS": has_bias, "HAS_FACTOR": has_factor}
    return Launch(_matmul_row_kernel, {"M": m, **cut(k), **ends}, cut(k)["SHARES"], 1)


def variants() -> list[Variant]:
    """Return the compilations to report on: one row and two."""
    return [
        Variant(
            f"matmul_row, {m} rows, rank {rank}",
            _form(m, 4096, rank, rank > 0, False),
            SHARES * 16 * GROUP,
            indivisible=("rank",),
            targets=WGMMA + MMA,
        )
        for m, rank in ((1, 0), (1, 16), (2, 16))
    ]
