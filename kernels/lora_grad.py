"""What an adapter's backward takes from one pass over a tall matrix z: z.T @ v, z @ w, column sums.

A program has a strip of columns and a chunk of rows. Its part of z.T @ v stays in registers over
the chunk; its part of z @ w is left for each row. Parts are added up by PyTorch in a fixed order.
Sums in fp32. Reads 2 bytes an element of z; 4 r flops.
Source: LoRA (https://arxiv.org/abs/2106.09685, section 4.1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tools.cost import device_of
from ..tools.dropout import dropout_threshold
from ._aot import Variant
from ._configs import MATRIX, MMA, WGMMA, is_amd, padded_rank
from ._dropout import keep

BLOCK_M = 64


@triton.jit
def _lora_grad_kernel(
    z_ptr,  # float16 or bfloat16 [M, C]
    v_ptr,  # dtype of z [M, rank]
    w_ptr,  # float [C, rank]
    seed_ptr,  # int64 []
    across_ptr,  # float32 [chunks, C, rank]
    along_ptr,  # float32 [strips, M, rank]
    sums_ptr,  # float32 [chunks, C]
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
            tl.store(along_ptr + row[:, None] * rank + offs_r[None, :], along, mask=mask_v)
        if HAS_SUMS:
            sums += tl.sum(z.to(tl.float32), axis=0)
        if DROPOUT:
            columns = strip * BLOCK_C + 8 * tl.arange(0, BLOCK_C // 8)
            z = tl.where(keep(seed_ptr, offs_m, columns, C, threshold), z, 0.0)
        across = tl.dot(tl.trans(z), v, across)
    column = chunk.to(tl.int64) * C + offs_c
    mask_across = mask_c[:, None] & mask_r[None, :]
    tl.store(across_ptr + column[:, None] * rank + offs_r[None, :], across, mask=mask_across)
    if HAS_SUMS:
        tl.store(sums_ptr + column, sums, mask=mask_c)


def lora_grad(
    z: Tensor,
    v: Tensor,
    w: Tensor | None,
    scaling: float,
    need_sums: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the products and sums; arguments as in nf4/reference/lora_grad.py."""
    (m, c), rank = z.shape, v.shape[1]
    padded = padded_rank(rank)
    block_c, num_warps = _strip(padded)
    strips = -(-c // block_c)
    chunks = max(1, min(-(-2 * device_of(z.device).sms // strips), -(-m // BLOCK_M)))
    rows_a_chunk = -(-m // (chunks * BLOCK_M)) * BLOCK_M
    chunks = -(-m // rows_a_chunk) if m else 0
    across = z.new_empty(chunks, c, rank, dtype=torch.float32)
    along = z.new_empty(strips if w is not None else 0, m, rank, dtype=torch.float32)
    sums = z.new_empty(chunks if need_sums else 0, c, dtype=torch.float32)
    if m:
        _lora_grad_kernel[(strips, chunks)](
            z,
            v,
            z if w is None else w,
            z if seed is None else seed,
            across,
            across if w is None else along,
            sums if need_sums else across,
            m,
            c,
            rank,
            rows_a_chunk,
            dropout_threshold(dropout_p),
            BLOCK_M=BLOCK_M,
            BLOCK_C=block_c,
            RANK=padded,
            HAS_W=w is not None,
            HAS_SUMS=need_sums,
            DROPOUT=seed is not None,
            num_warps=num_warps,
            num_stages=2,
            enable_fp_fusion=False,
        )
    factor = scaling / (1 - dropout_p)
    return (
        across.sum(dim=0).mul_(factor),
        None if w is None else along.sum(dim=0).mul_(scaling).to(z.dtype),
        sums.sum(dim=0) if need_sums else None,
    )


def max_rank(device: torch.device) -> int:
    """Return the largest rank that fits the registers of a device."""
    return 32 if is_amd(device) else 64


def _strip(padded_rank: int) -> tuple[int, int]:
    """Return columns and warps of a program: what its registers hold of z.T @ v."""
    return (256, 8) if padded_rank <= 32 else (128, 8)


def variants() -> list[Variant]:
    """Return the compilations to report on; instructions are per element of z."""
    signature = {
        "z_ptr": "*bf16",
        "v_ptr": "*bf16",
        "w_ptr": "*fp32",
        "seed_ptr": "*i64",
        "across_ptr": "*fp32",
        "along_ptr": "*fp32",
        "sums_ptr": "*fp32",
        "M": "i32",
        "C": "i32",
        "rank": "i32",
        "rows_a_chunk": "i32",
        "threshold": "i32",
    }
    made = []
    for rank, dropout in ((16, False), (16, True), (64, False)):
        block_c, num_warps = _strip(rank)
        made.append(
            Variant(
                f"lora_grad, rank {rank}" + (", dropout" if dropout else ", both"),
                _lora_grad_kernel,
                signature,
                {
                    "BLOCK_M": BLOCK_M,
                    "BLOCK_C": block_c,
                    "RANK": rank,
                    "HAS_W": not dropout,
                    "HAS_SUMS": not dropout,
                    "DROPOUT": dropout,
                },
                BLOCK_M * block_c,
                num_warps,
                2,
                indivisible=("M", "rank"),
                targets=MATRIX if rank <= 32 else WGMMA + MMA,
            )
        )
    return made
