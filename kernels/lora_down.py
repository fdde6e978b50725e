"""The input side of an adapter in one pass over x: t = drop(x) @ lora_A.T / (1 - p).

The dropout mask is made from its seed where x is read. Programs split K as in kernels/matmul.py.
Sums in fp32, t rounded once. Reads 2 bytes an element of x; 2 r flops.
Source: LoRA (https://arxiv.org/abs/2106.09685, section 4.1).
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tools.caches import forgettable
from ..tools.dropout import dropout_threshold
from ..tools.terms import Dropout
from ._aot import Variant
from ._configs import MATRIX, MatmulConfig, lora_down_config, lora_down_warps
from ._dropout import keep
from ._launch import Launch
from ._product import add_parts, split_k_scratch


@triton.jit
def down(
    x_ptr,  # these as in _lora_down_kernel
    lora_A_ptr,
    seed_ptr,
    t_ptr,
    parts_ptr,
    arrived_ptr,
    M,
    K,
    rank,
    threshold,
    kept_inverse,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Multiply a tile of x by A, over a share of K, and store what all shares come to."""
    pid_m, pid_k = tl.program_id(0), tl.program_id(1)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows = tl.minimum(offs_m, M - 1)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, RANK)
    x_ptrs = x_ptr + rows[:, None] * K + offs_k[None, :]
    a_ptrs = lora_A_ptr + offs_r[None, :] * K + offs_k[:, None]
    mask_r = (offs_r < rank)[None, :]
    acc = tl.zeros([BLOCK_M, RANK], tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    for step in tl.range(steps * pid_k // SPLIT_K, steps * (pid_k + 1) // SPLIT_K):
        first = step * BLOCK_K
        mask_k = offs_k < K - first
        x = tl.load(x_ptrs + first, mask=mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if DROPOUT:
            kept_here = keep(seed_ptr, rows, first + 8 * tl.arange(0, BLOCK_K // 8), K, threshold)
            x = tl.where(kept_here, x, 0.0)
        a = tl.load(a_ptrs + first, mask=mask_k[:, None] & mask_r, other=0.0)  # [BLOCK_K, RANK]
        acc = tl.dot(x, a.to(x.dtype), acc)
    mask = (offs_m < M)[:, None] & mask_r
    acc, is_last = add_parts(
        acc, parts_ptr, arrived_ptr, pid_m, tl.num_programs(0), pid_k, mask, SPLIT_K
    )
    if is_last:
        t = acc * kept_inverse
        t_rows = t_ptr + pid_m.to(tl.int64) * BLOCK_M * rank
        t_ptrs = t_rows + tl.arange(0, BLOCK_M)[:, None] * rank + offs_r[None, :]
        tl.store(t_ptrs, t.to(t_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lora_down_kernel(
    x_ptr,  # float16 or bfloat16 [M, K]
    lora_A_ptr,  # float [rank, K]
    seed_ptr,  # int64 []
    t_ptr,  # dtype of x [M, rank]
    parts_ptr,  # float32 [SPLIT_K, tiles, BLOCK_M * RANK]
    arrived_ptr,  # int32 [tiles], zeros before and after
    M,
    K,
    rank,
    threshold,  # of 16 bits
    kept_inverse,  # 1 / (1 - p)
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,  # rank rounded up to a power of two from 16
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    down(
        x_ptr,
        lora_A_ptr,
        seed_ptr,
        t_ptr,
        parts_ptr,
        arrived_ptr,
        M,
        K,
        rank,
        threshold,
        kept_inverse,
        BLOCK_M,
        RANK,
        BLOCK_K,
        SPLIT_K,
        DROPOUT,
    )


def lora_down(x: Tensor, lora_A: Tensor, dropout: Dropout, out: Tensor | None = None) -> Tensor:
    """Return t; arguments as in nf4/reference/lora_down.py."""
    rank, k = lora_A.shape
    m = math.prod(x.shape[:-1])
    t = torch.empty(m, rank, dtype=x.dtype, device=x.device) if out is None else out
    if m == 0:
        return t
    config, form = _prepared(m, k, rank, dropout.seed is not None, x.device)
    tiles = -(-m // config.block_m)
    parts, arrived = split_k_scratch(config, tiles, t)
    kept = (dropout_threshold(dropout.p), 1 / (1 - dropout.p))
    form((tiles, config.split_k), x, lora_A, dropout.seed, t, parts, arrived, m, k, rank, *kept)
    return t


@forgettable
@lru_cache(maxsize=4096)
def _prepared(
    m: int, k: int, rank: int, dropout: bool, device: torch.device
) -> tuple[MatmulConfig, Launch]:
    """Return the cut of x ``[m, k]``, and the launch."""
    config = lora_down_config(m, k, rank, device)
    return config, _form(config, block_k(rank), dropout)


@forgettable
@lru_cache
def _form(config: MatmulConfig, block_k: int, dropout: bool) -> Launch:
    constants = {
        "BLOCK_M": config.block_m,
        "RANK": config.block_n,
        "BLOCK_K": block_k,
        "SPLIT_K": config.split_k,
        "DROPOUT": dropout,
    }
    return Launch(_lora_down_kernel, constants, config.num_warps, config.num_stages)


def block_k(rank: int) -> int:
    """Return columns of x a step: what registers take of A beside the sums."""
    return 64 if rank <= 64 else 32


def variants() -> list[Variant]:
    """Return the compilations to report on; instructions are per element of x."""

    def variant(block_m: int, rank: int, dropout: bool) -> Variant:
        config = MatmulConfig(block_m, rank, *lora_down_warps(rank), 0, split_k=4)
        return Variant(
            f"lora_down, {block_m} rows, rank {rank}" + (", dropout" if dropout else ""),
            _form(config, block_k(rank), dropout),
            block_m * block_k(rank),
            indivisible=("M", "rank"),
            targets=MATRIX,
        )

    forms = ((16, 16, False), (64, 16, False), (64, 16, True), (64, 256, True))
    return [variant(*form) for form in forms]
