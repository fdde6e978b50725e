"""What an adapter's backward takes from one pass over a tall matrix z: z.T @ v, z @ w, column sums.

A program has a strip of columns and a chunk of rows. Its part of z.T @ v stays in registers over
the chunk; its part of z @ w is left for each row. A second launch adds all parts up, in a fixed
order. Sums in fp32. Reads 2 bytes an element of z; 4 r flops.
Source: LoRA (https://arxiv.org/abs/2106.09685, section 4.1).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tools.caches import forgettable
from ..tools.cost import DEVICES, Device, device_of
from ..tools.dropout import dropout_threshold
from ..tools.scratch import scratch
from ..tools.terms import Dropout
from ._aot import Variant
from ._configs import MFMA, MMA, WGMMA, has_wgmma, is_amd, padded_rank
from ._dropout import keep
from ._launch import Launch, spoil

BLOCK_M = 64
ADDED = 128  # elements that a program adds up
MOST_KEPT = 2**23  # elements of parts for which memory is kept


@triton.jit
def _lora_grad_kernel(
    z_ptr,  # float16 or bfloat16 [M, C]
    v_ptr,  # dtype of z [M, rank]
    w_ptr,  # float [C, rank]
    seed_ptr,  # int64 []
    parts_ptr,  # float32: z.T @ v [chunks, C, rank], z @ w [strips, M, rank], sums [chunks, C]
    first_along,  # where parts of z @ w begin
    first_sums,
    M,
    C,
    rank,
    rows_a_chunk,  # a multiple of BLOCK_M
    threshold,  # of 16 bits
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RANK: tl.constexpr,  # rank rounded up to a power of two from 16
    HAS_W: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    strip, chunk = tl.program_id(0), tl.program_id(1)
    offs_c = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, RANK)
    mask_c, mask_r = offs_c < C, offs_r < rank
    if HAS_W:
        w_ptrs = w_ptr + offs_c.to(tl.int64)[:, None] * rank + offs_r[None, :]
        w = tl.load(w_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        w = w.to(z_ptr.dtype.element_ty)  # [BLOCK_C, RANK]
    across = tl.zeros([BLOCK_C, RANK], tl.float32)
    sums = tl.zeros([BLOCK_C], tl.float32)
    begin = chunk.to(tl.int64) * rows_a_chunk
    for first in tl.range(begin, tl.minimum(begin + rows_a_chunk, M), BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        z_ptrs = z_ptr + offs_m[:, None] * C + offs_c[None, :]
        z = tl.load(z_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        mask_v = mask_m[:, None] & mask_r[None, :]
        v = tl.load(v_ptr + offs_m[:, None] * rank + offs_r[None, :], mask=mask_v, other=0.0)
        if HAS_W:
            along = tl.dot(z, w)  # [BLOCK_M, RANK]
            row = strip.to(tl.int64) * M + offs_m
            tl.store(
                parts_ptr + first_along + row[:, None] * rank + offs_r[None, :], along, mask=mask_v
            )
        if HAS_SUMS:
            sums += tl.sum(z.to(tl.float32), axis=0)
        if DROPOUT:
            columns = strip * BLOCK_C + 8 * tl.arange(0, BLOCK_C // 8)
            z = tl.where(keep(seed_ptr, offs_m, columns, C, threshold), z, 0.0)
        across = tl.dot(tl.trans(z), v, across)
    column = chunk.to(tl.int64) * C + offs_c
    mask_across = mask_c[:, None] & mask_r[None, :]
    tl.store(parts_ptr + column[:, None] * rank + offs_r[None, :], across, mask=mask_across)
    if HAS_SUMS:
        tl.store(parts_ptr + first_sums + column, sums, mask=mask_c)


@triton.jit
def _add(parts_ptr, out_ptr, size, count, factor, pid, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Add up parts ``[count, size]``, SIZE elements in a fixed order, and store them times factor.

    COLUMNS is 0, or the number of columns of a part that is stored transposed.
    """
    AT_ONCE: tl.constexpr = 32  # parts
    offs = pid * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([AT_ONCE, SIZE], tl.float32)
    for first in range(0, count, AT_ONCE):
        parts = first + tl.arange(0, AT_ONCE)
        part_ptrs = parts_ptr + parts.to(tl.int64)[:, None] * size + offs[None, :]
        mask = (parts < count)[:, None] & (offs < size)[None, :]
        total += tl.load(part_ptrs, mask=mask, other=0.0)
    out = tl.sum(total, axis=0) * factor
    offs_out = offs
    if COLUMNS:
        offs_out = offs % COLUMNS * (size // COLUMNS) + offs // COLUMNS
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _add_parts_kernel(
    parts_ptr,  # float32, of across [chunks, C, rank], of along [strips, M, rank], of sums
    across_ptr,  # float32 [C, rank], or [rank, C]
    along_ptr,  # dtype of z [M, rank]
    sums_ptr,  # float32 [C]
    first_along,  # where parts of along begin
    first_sums,
    M,
    C,
    rank,
    chunks,
    strips,
    factor,  # of across
    scaling,  # of along
    SIZE: tl.constexpr,  # elements a program
    COLUMNS: tl.constexpr,  # 0, or the rank where across is wanted transposed
    HAS_W: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.cdiv(C * rank, SIZE)
    if pid < programs:
        _add(parts_ptr, across_ptr, C * rank, chunks, factor, pid, SIZE, COLUMNS)
    pid -= programs
    if HAS_W:
        programs = tl.cdiv(M * rank, SIZE)
        if (pid >= 0) & (pid < programs):
            _add(parts_ptr + first_along, along_ptr, M * rank, strips, scaling, pid, SIZE, 0)
        pid -= programs
    if HAS_SUMS and pid >= 0:
        _add(parts_ptr + first_sums, sums_ptr, C, chunks, 1.0, pid, SIZE, 0)


@dataclass(frozen=True)
class _Cut:
    """How the pass over z is cut: rows a step, columns and warps a program, stages, chunks."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int
    rows_a_chunk: int


def _cut(m: int, c: int, rank: int, has_w: bool, device: Device, wgmma: bool) -> _Cut:
    """Return the cut of z ``[m, c]``.

    As swept on an H200 for GPUs like it: a program a multiprocessor, each with a deep pipeline, for
    parts of z @ w are written once a strip. What takes no whole vectors of v has fewer registers.
    """
    padded = padded_rank(rank)
    block_c, stages = 256 if padded <= 32 else 128, 2
    if wgmma:
        wide = has_w and (padded <= 32 or rank % 16 == 0)
        block_c, stages = 256 if wide else 128, 4
    strips = -(-c // block_c)
    chunks = device.sms // strips if wgmma else -(-2 * device.sms // strips)
    chunks = max(1, min(chunks, -(-m // BLOCK_M)))
    return _Cut(BLOCK_M, block_c, 8, stages, -(-m // (chunks * BLOCK_M)) * BLOCK_M)


def _forms(
    cut: _Cut, rank: int, has_w: bool, has_sums: bool, dropout: bool, transposed: bool
) -> tuple[Launch, Launch]:
    """Return the pass over z, and what adds its parts up."""
    ends = {"HAS_W": has_w, "HAS_SUMS": has_sums}
    constants = {
        "BLOCK_M": cut.block_m,
        "BLOCK_C": cut.block_c,
        "RANK": padded_rank(rank),
        "DROPOUT": dropout,
    }
    added = {"SIZE": ADDED, "COLUMNS": rank * transposed}
    return (
        Launch(_lora_grad_kernel, {**constants, **ends}, cut.num_warps, cut.num_stages),
        Launch(_add_parts_kernel, {**added, **ends}),
    )


@forgettable
@lru_cache(maxsize=4096)
def _prepared(
    m: int, c: int, rank: int, ends: tuple[bool, bool, bool, bool], device: torch.device
) -> tuple[_Cut, Launch, Launch]:
    """Return the cut and both launches; ends are has_w, has_sums, dropout and transposed."""
    cut = _cut(m, c, rank, ends[0], device_of(device), has_wgmma(device))
    return (cut, *_forms(cut, rank, *ends))


def lora_grad(
    z: Tensor,
    v: Tensor,
    w: Tensor | None,
    scaling: float,
    need_sums: bool,
    dropout: Dropout,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the products and sums; arguments as in nf4/reference/lora_grad.py."""
    c, rank, device = z.shape[-1], v.shape[1], z.device
    m = math.prod(z.shape[:-1])
    has_w = w is not None
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    across = torch.empty((rank, c) if transposed else (c, rank), **options)
    along = torch.empty_like(v) if has_w else None
    sums = torch.empty(c, **options) if need_sums else None
    if m == 0:
        spoil()
        return across.zero_(), along, None if sums is None else sums.zero_()
    ends = (has_w, need_sums, dropout.seed is not None, transposed)
    cut, form, add = _prepared(m, c, rank, ends, device)
    strips, chunks = -(-c // cut.block_c), -(-m // cut.rows_a_chunk)
    first_along = _rounded(chunks * c * rank)
    first_sums = first_along + _rounded(strips * m * rank * has_w)
    size = first_sums + chunks * c * need_sums
    if size <= MOST_KEPT:
        parts = scratch("lora_grad parts", size, torch.float32, device)
    else:
        spoil()  # too much for a launch to be repeated with it
        parts = torch.empty(size, **options)
    sizes = (first_along, first_sums, m, c, rank)
    threshold = dropout_threshold(dropout.p)
    form((strips, chunks), z, v, w, dropout.seed, parts, *sizes, cut.rows_a_chunk, threshold)
    added = (c * rank, m * rank * has_w, c * need_sums)
    programs = sum(-(-size // ADDED) for size in added)
    factors = (scaling / (1 - dropout.p), float(scaling))
    add((programs,), parts, across, along, sums, *sizes, chunks, strips, *factors)
    return across, along, sums


def _rounded(elements: int) -> int:
    """Return the next multiple of 16, so that what follows lies at a multiple of 64 bytes."""
    return -(-elements // 16) * 16


def max_rank(device: torch.device) -> int:
    """Return the largest rank that fits the registers of a device."""
    return 32 if is_amd(device) else 64


def variants() -> list[Variant]:
    """Return the compilations to report on; instructions are per element of z, or of a part."""
    made = []
    families = ((True, WGMMA), (False, MMA + MFMA))
    forms = ((16, False), (16, True), (64, False), (50, False))
    for (rank, dropout), (wgmma, targets) in product(forms, families):
        cut = _cut(4096, 4096, rank, not dropout, DEVICES[0], wgmma)
        name = f"lora_grad, rank {rank}, {'dropout' if dropout else 'both'}"
        made.append(
            Variant(
                name if wgmma else f"{name}, mma",
                _forms(cut, rank, not dropout, not dropout, dropout, False)[0],
                cut.block_m * cut.block_c,
                indivisible=("M",) if rank == 64 else ("M", "rank"),
                targets=targets if rank <= 32 else tuple(t for t in targets if t not in MFMA),
            )
        )
    cut = _cut(4096, 4096, 16, True, DEVICES[0], True)
    adding = _forms(cut, 16, True, True, False, False)[1]
    odd = ("M", "rank", "chunks", "strips")
    return [*made, Variant("lora_grad, adding up", adding, 32 * ADDED, indivisible=odd)]
