"""Multiply one or two rows by up to three weights in one launch each: those of layers of one input.

What kernels/matmul_row.py and lora_down.py compute of each weight, bit for bit: a program finds out
by its number whose rows it has. A token of a model of many layers is made of launches; a query, a
key and a value, or a gate and what it opens, cost one instead of three or two.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..codebook import absmax_map, nf4_levels
from ..tensor import Weight
from ..tools.caches import forgettable
from ._aot import Variant
from ._configs import (
    MATRIX,
    MMA,
    WGMMA,
    MatmulConfig,
    lora_down_config,
    lora_down_warps,
    padded_rank,
)
from ._launch import Launch, aligned
from ._product import split_k_scratch
from .lora_down import block_k, down
from .matmul_row import cut, row_product

MOST = 3  # weights


@triton.jit
def _choose(first, second, third, member):
    """Return what belongs to a member; pointers stay multiples of what all are multiples of."""
    return tl.where(member == 0, first, tl.where(member == 1, second, third))


@triton.jit
def _row_group_kernel(
    x_ptr,  # float16 or bfloat16 [M, K]
    words_0_ptr,  # int32 [N0 / 16, K / 64, 128], or their bytes
    words_1_ptr,
    words_2_ptr,
    absmax_0_ptr,  # uint8 codes [K / 256, N0, 4]
    absmax_1_ptr,
    absmax_2_ptr,
    absmax2_0_ptr,  # float32 [ceil(blocks / 256)]
    absmax2_1_ptr,
    absmax2_2_ptr,
    offset_0_ptr,  # float32 []
    offset_1_ptr,
    offset_2_ptr,
    map_ptr,  # float32 [256]
    levels_ptr,  # float32 [16]
    t_ptr,  # dtype of x [members, M, rank]
    lora_B_0_ptr,  # float [N0, rank], rounded to the dtype of x
    lora_B_1_ptr,
    lora_B_2_ptr,
    bias_0_ptr,  # float [N0]
    bias_1_ptr,
    bias_2_ptr,
    y_0_ptr,  # dtype of x [M, N0]
    y_1_ptr,
    y_2_ptr,
    N0,
    N1,
    N2,
    K,
    rank,
    scaling_0,
    scaling_1,
    scaling_2,
    M: tl.constexpr,
    SHARES: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    row = tl.program_id(0) * 16
    member = (row >= N0).to(tl.int32) + (row >= N0 + N1).to(tl.int32)
    row_product(
        x_ptr,
        _choose(words_0_ptr, words_1_ptr, words_2_ptr, member),
        _choose(absmax_0_ptr, absmax_1_ptr, absmax_2_ptr, member),
        _choose(absmax2_0_ptr, absmax2_1_ptr, absmax2_2_ptr, member),
        _choose(offset_0_ptr, offset_1_ptr, offset_2_ptr, member),
        map_ptr,
        levels_ptr,
        t_ptr + member * (M * rank),
        _choose(lora_B_0_ptr, lora_B_1_ptr, lora_B_2_ptr, member),
        _choose(bias_0_ptr, bias_1_ptr, bias_2_ptr, member),
        x_ptr,  # of no factor
        _choose(y_0_ptr, y_1_ptr, y_2_ptr, member),
        row - _choose(0, N0, N0 + N1, member),
        _choose(N0, N1, N2, member),
        K,
        rank,
        _choose(scaling_0, scaling_1, scaling_2, member),
        M,
        SHARES,
        STEPS,
        EVEN,
        RANK,
        HAS_BIAS,
        False,
        SHUFFLE,
    )


@triton.jit
def _down_group_kernel(
    x_ptr,  # float16 or bfloat16 [M, K]
    lora_A_0_ptr,  # float [rank, K]
    lora_A_1_ptr,
    lora_A_2_ptr,
    t_ptr,  # dtype of x [members, M, rank]
    parts_ptr,  # float32 [members, SPLIT_K, BLOCK_M * RANK]
    arrived_ptr,  # int32 [members], zeros before and after
    M,
    K,
    rank,
    BLOCK_M: tl.constexpr,  # at least M
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    member = tl.program_id(2)
    down(
        x_ptr,
        _choose(lora_A_0_ptr, lora_A_1_ptr, lora_A_2_ptr, member),
        x_ptr,  # of no seed
        t_ptr + member * M * rank,
        parts_ptr + member * (SPLIT_K * BLOCK_M * RANK),
        arrived_ptr + member,
        M,
        K,
        rank,
        0,
        1.0,
        BLOCK_M,
        RANK,
        BLOCK_K,
        SPLIT_K,
        False,
    )


def row_group(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    t: Tensor | None = None,
    factors: Sequence[tuple[Tensor, float]] = (),
) -> list[Tensor]:
    """Multiply rows by each weight, as `matmul_row` does.

    Args:
        x: float16 or bfloat16 ``[M, K]``, one or two rows, contiguous.
        weights: W ``[N, K]`` of each, two or three, that `matmul_row` takes.
        biases: floating ``[N]`` of each, of one dtype, or None for all.
        t: dtype of x ``[members, M, r]``, what `down_group` returns, or None.
        factors: with t, lora_B ``[N, r]`` of each, contiguous and of one dtype, and its scaling.

    Returns:
        y ``[M, N]`` of each.
    """
    (m, k), device = x.shape, x.device
    ys = [x.new_empty(m, weight.shape[0]) for weight in weights]
    rank = 0 if t is None else t.shape[2]
    form = _form(m, k, padded_rank(rank), biases[0] is not None)
    sizes = [y.shape[1] for y in ys]
    held = [(aligned(w.packed), aligned(w.absmax), w.absmax2, w.offset) for w in weights]
    own = [part for parts in zip(*held, strict=True) for part in _three(parts)]
    tables = (absmax_map(device), nf4_levels(device))
    lora_B, scalings = zip(*factors, strict=True) if factors else ((None,), (1.0,))
    terms = (t, *_three(lora_B), *_three(biases))
    arguments = (aligned(x), *own, *tables, *terms, *_three(ys), *(*sizes, 0)[:MOST])
    form((sum(sizes) // 16,), *arguments, k, rank, *_three(scalings))
    return ys


def _three(values: Sequence[Any]) -> list[Any]:
    """Return a value for each place that the kernel has; of the last one nothing is read."""
    return [*values, *[values[-1]] * (MOST - len(values))]


def down_group(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return x @ lora_A.T of each factor, as `lora_down` does without dropout.

    Args:
        x: float16 or bfloat16 ``[M, K]``, few rows, contiguous.
        factors: lora_A ``[r, K]`` of each, two or three, contiguous.

    Returns:
        dtype of x ``[members, M, r]``.
    """
    (m, k), rank, members = x.shape, factors[0].shape[0], len(factors)
    t = x.new_empty(members, m, rank)
    config = lora_down_config(m, k, rank, x.device)
    parts, arrived = split_k_scratch(config, members, t)
    form = _down_form(config, block_k(rank))
    form((1, config.split_k, members), x, *_three(factors), t, parts, arrived, m, k, rank)
    return t


@forgettable
@lru_cache
def _form(m: int, k: int, padded: int, has_bias: bool) -> Launch:
    constants = {"M": m, **cut(k), "RANK": padded, "HAS_BIAS": has_bias}
    return Launch(_row_group_kernel, constants, cut(k)["SHARES"], 1)


@forgettable
@lru_cache
def _down_form(config: MatmulConfig, columns: int) -> Launch:
    constants = {
        "BLOCK_M": config.block_m,
        "RANK": config.block_n,
        "BLOCK_K": columns,
        "SPLIT_K": config.split_k,
    }
    return Launch(_down_group_kernel, constants, config.num_warps, config.num_stages)


def variants() -> list[Variant]:
    """Return the compilations to report on."""
    kinds = {"words": "*i32", "absmax": "*u8", "absmax2": "*fp32", "offset": "*fp32"}
    kinds |= {"lora_B": "*fp32", "bias": "*bf16", "y": "*bf16", "lora_A": "*fp32"}
    types = {f"{name}_{i}_ptr": kind for name, kind in kinds.items() for i in range(MOST)}
    types |= {f"scaling_{i}": "fp32" for i in range(MOST)}
    config = MatmulConfig(16, 16, *lora_down_warps(16), 0, split_k=4)
    return [
        *(
            Variant(
                f"row_group, {m} rows, rank {rank}",
                _form(m, 4096, rank, False),
                8 * 16 * 256,
                types,
                indivisible=("rank",),
                targets=WGMMA + MMA,
            )
            for m, rank in ((1, 0), (2, 16))
        ),
        Variant(
            "row_group, down, rank 16",
            _down_form(config, block_k(16)),
            16 * block_k(16),
            types,
            indivisible=("M", "rank"),
            targets=MATRIX,
        ),
    ]
