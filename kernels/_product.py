"""What both products share: programs that split K, the low-rank term, bias, factor, the launch."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import absmax_map, nf4_levels
from ..tensor import Weight
from ..tools.caches import forgettable
from ..tools.scratch import scratch, zeros
from ..tools.terms import Epilogue
from ._configs import MatmulConfig, padded_rank
from ._launch import Launch, aligned


@triton.jit
def add_parts(
    acc,  # fp32 [BLOCK_N, BLOCK_M]
    parts_ptr,  # float32 [SPLIT_K, tiles, BLOCK_N * BLOCK_M]
    arrived_ptr,  # int32 [tiles], zeros before and after
    tile,
    tiles,
    pid_k,
    mask,  # bool, of the sums that are wanted
    SPLIT_K: tl.constexpr,
):
    """Return the sum over all programs of a tile, and whether this program has it.

    Each program stores its part and counts itself; the last one to come reads all parts in order.
    """
    if SPLIT_K == 1:
        return acc, True
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    size: tl.constexpr = BLOCK_N * BLOCK_M
    part_ptrs = parts_ptr + tile.to(tl.int64) * size + offs
    stride = tiles.to(tl.int64) * size
    tl.store(part_ptrs + pid_k * stride, acc, mask=mask)
    tl.debug_barrier()  # all threads have stored before one of them counts the program
    is_last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if is_last:
        tl.store(arrived_ptr + tile, 0)
        acc = tl.zeros_like(acc)
        for k in range(SPLIT_K):
            acc += tl.load(part_ptrs + k * stride, mask=mask, cache_modifier=".cg")
    return acc, is_last


@triton.jit
def finish(
    acc,  # fp32 [BLOCK_N, BLOCK_M], x @ W.T transposed
    t_ptr,  # dtype of y [M, rank]
    lora_B_ptr,  # float [N, rank], rounded to the dtype of y
    bias_ptr,  # float [N]
    factor_ptr,  # float [N]
    y_ptr,  # [M, N]
    first_m,
    first_n,
    M,
    N,
    rank,
    scaling,
    RANK: tl.constexpr,  # 0, or rank rounded up to a power of two from 16
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
):
    """Add scaling * t @ lora_B.T and bias to a tile, scale it and store it, rounded once."""
    offs_m = first_m + tl.arange(0, acc.shape[1])
    offs_n = first_n + tl.arange(0, acc.shape[0])
    mask_m, mask_n = offs_m < M, offs_n < N
    rows_m, rows_n = offs_m.to(tl.int64), offs_n.to(tl.int64)
    if RANK > 0:
        # One accumulator serves both terms: its sum is divided by scaling before, multiplied after.
        acc *= tl.math.div_rn(1.0, scaling)
        STEP: tl.constexpr = 16  # what registers take beside the widest sums
        for first in tl.range(0, RANK, STEP, num_stages=1):
            offs_r = first + tl.arange(0, STEP)
            mask_r = offs_r < rank
            b = tl.load(
                lora_B_ptr + rows_n[:, None] * rank + offs_r[None, :],
                mask=mask_n[:, None] & mask_r[None, :],
                other=0.0,
            )
            t = tl.load(
                t_ptr + rows_m[None, :] * rank + offs_r[:, None],
                mask=mask_m[None, :] & mask_r[:, None],
                other=0.0,
            )
            acc = tl.dot(b.to(t.dtype), t, acc)
        acc *= scaling
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if HAS_FACTOR:
        acc *= tl.load(factor_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + rows_m[None, :] * N + rows_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[None, :] & mask_n[:, None])


def split_k_scratch(config: MatmulConfig, tiles: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return parts_ptr and arrived_ptr of `add_parts` for a product whose result is y."""
    if config.split_k == 1:
        return y, y  # not read
    size = config.split_k * tiles * config.block_m * config.block_n
    parts = scratch("split_k parts", size, torch.float32, y.device)
    return parts, zeros("split_k arrived", tiles, torch.int32, y.device)


class ProductForm(NamedTuple):
    """What a product is compiled for beside its cut, as far as its kernel has constants for it.

    Attributes:
        block_size: elements that share one absmax.
        unroll: tiles of 64 columns a step.
        grouped: whether a step's blocks are a group of four codes a row.
        whole: whether the blocks of a row are whole groups of four.
        rank: 0, or the low-rank term's, padded.
        has_bias: whether there is a bias.
        has_factor: whether outputs have factors.
    """

    block_size: int
    unroll: int
    grouped: bool
    whole: bool = True
    rank: int = 0
    has_bias: bool = False
    has_factor: bool = False


# A result, and what fills it, with what arguments
Prepared = tuple[Tensor, Callable[..., None], tuple[Any, ...]]


def _nothing() -> None:
    """Fill no rows."""


def prepare_product(
    kernel: Any, config: MatmulConfig, tiles: int, x: Tensor, weight: Weight, epilogue: Epilogue
) -> Prepared:
    """Return y ``[M, N]``, and what fills it with what arguments.

    The kernel is that of kernels/matmul.py or matmul_small.py.
    """
    (m, k), n, device = x.shape, weight.shape[0], x.device
    packed, absmax, absmax2, offset, _, block_size, _ = weight
    bias, t, lora_B, scaling, factor = epilogue
    y = x.new_empty(m, n)
    if m == 0:
        return y, _nothing, ()
    rank = 0 if t is None else t.shape[1]
    parts, arrived = split_k_scratch(config, tiles, y)
    unroll = 4 if k % 256 == 0 else 2 if k % 128 == 0 else 1
    grouped = unroll == 4 and block_size == 64 and absmax.dtype == torch.uint8
    ends = (padded_rank(rank), bias is not None, factor is not None)
    whole = k // block_size % 4 == 0
    form = product_form(kernel, config, ProductForm(block_size, unroll, grouped, whole, *ends))
    tables = (absmax_map(device), nf4_levels(device))
    held = (aligned(packed), aligned(absmax), absmax2, offset, *tables)
    terms = (t, lora_B, bias, factor)
    grid, sizes = (tiles, config.split_k), (m, n, k, rank, scaling)
    return y, form, (grid, x, *held, *terms, y, parts, arrived, *sizes)


@forgettable
@lru_cache
def product_form(kernel: Any, config: MatmulConfig, form: ProductForm) -> Launch:
    """Return how a product is launched."""
    constants = {
        "BLOCK_SIZE": form.block_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "UNROLL": form.unroll,
        "GROUPED": form.grouped,
        "WHOLE": form.whole,
        "SPLIT_K": config.split_k,
        "RANK": form.rank,
        "HAS_BIAS": form.has_bias,
        "HAS_FACTOR": form.has_factor,
    }
    return Launch(kernel, constants, config.num_warps, config.num_stages)
