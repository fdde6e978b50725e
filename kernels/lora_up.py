"""The output side of an adapter in one pass over its result: drop(s * t @ b) / (1 - p) + bias.

The dropout mask is made from its seed where the result is written. Sums in fp32, rounded once.
Writes 2 bytes an element; 2 r flops.
Source: LoRA (https://arxiv.org/abs/2106.09685, section 4.1).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tools.caches import forgettable
from ..tools.dropout import dropout_threshold
from ..tools.terms import Dropout
from ._aot import Variant
from ._configs import MATRIX, padded_rank
from ._dropout import keep
from ._launch import Launch

BLOCK_M, BLOCK_N, NUM_WARPS = 64, 128, 8


@triton.jit
def _lora_up_kernel(
    t_ptr,  # float16 or bfloat16 [M, rank]
    b_ptr,  # float [rank, N]
    bias_ptr,  # float [N]
    seed_ptr,  # int64 []
    out_ptr,  # dtype of t [M, N]
    M,
    N,
    rank,
    stride_br,
    stride_bn,
    scaling,
    threshold,  # of 16 bits
    kept_inverse,  # 1 / (1 - p)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,  # rank rounded up to a power of two from 16
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    first_m, first_n = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_N
    offs_m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    STEP: tl.constexpr = min(RANK, 64)
    for first in tl.range(0, RANK, STEP, num_stages=1):
        offs_r = first + tl.arange(0, STEP)
        t_ptrs = t_ptr + offs_m[:, None] * rank + offs_r[None, :]
        t = tl.load(t_ptrs, mask=mask_m & (offs_r < rank)[None, :], other=0.0)
        b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        b = tl.load(b_ptrs, mask=mask_n & (offs_r < rank)[:, None], other=0.0)
        acc = tl.dot(t, b.to(t.dtype), acc)
    acc *= scaling
    if DROPOUT:
        columns = first_n + 8 * tl.arange(0, BLOCK_N // 8)
        acc = tl.where(keep(seed_ptr, offs_m, columns, N, threshold), acc, 0.0)
        acc *= kept_inverse
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m & mask_n)


def lora_up(t: Tensor, b: Tensor, scaling: float, bias: Tensor | None, dropout: Dropout) -> Tensor:
    """Return the sum; arguments as in nf4/reference/lora_up.py."""
    (m, rank), n = t.shape, b.shape[1]
    out = torch.empty(m, n, dtype=t.dtype, device=t.device)
    if m == 0:
        return out
    form = _form(padded_rank(rank), bias is not None, dropout.seed is not None)
    grid = (-(-n // BLOCK_N), -(-m // BLOCK_M))
    kept = (dropout_threshold(dropout.p), 1 / (1 - dropout.p))
    form(grid, t, b, bias, dropout.seed, out, m, n, rank, *b.stride(), scaling, *kept)
    return out


@forgettable
@lru_cache
def _form(padded: int, has_bias: bool, dropout: bool) -> Launch:
    constants = {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "RANK": padded,
        "HAS_BIAS": has_bias,
        "DROPOUT": dropout,
    }
    return Launch(_lora_up_kernel, constants, NUM_WARPS)


def variants() -> list[Variant]:
    """Return the compilations to report on; instructions are per element of the result."""
    return [
        Variant(
            f"lora_up, rank {rank}" + (", dropout" if dropout else ", bias"),
            _form(rank, not dropout, dropout),
            BLOCK_M * BLOCK_N,
            indivisible=("M", "rank"),
            ones=("stride_bn",),
            targets=MATRIX,
        )
        for rank, dropout in ((16, False), (16, True), (256, True))
    ]
