"""Quantize to NF4 in one pass: absmax of each block, then the code of each element.

    absmax[b] = max |x| over block b      code[i] = #{thresholds < x[i] * (1 / absmax)}

One program takes 8192 elements, or 4096 where it needs masks. [-1, 1] is cut into 32 equal buckets;
none holds two thresholds, so a code is one table lookup and one compare: base of the bucket, plus
one above its threshold. The largest magnitude keeps NaN, so that a block that is not finite has an
absmax that is not. Arithmetic and special cases as in nf4/reference/quantize.py. Moves 2 bytes in,
0.5 out and 0.06 of scales an element (bf16, block 64).
Source: QLoRA, section 3 (https://arxiv.org/abs/2305.14314).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import SMALLEST_ABSMAX
from ..tools.caches import forgettable
from ._aot import Variant
from ._encode import bucket_bases, bucket_thresholds, encode, reciprocal
from ._launch import Launch

TILE = 8192
MASKED_TILE = 4096  # the masks take registers
SMALLEST = tl.constexpr(SMALLEST_ABSMAX)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantize_kernel(
    x_ptr,  # float32, float16 or bfloat16 [n]
    packed_ptr,  # uint8 [ceil(n / 2)]
    absmax_ptr,  # float32 [ceil(n / BLOCK_SIZE)]
    thresholds_ptr,  # float32 [32]
    bases_ptr,  # int32 [32]
    n,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # blocks a program
    MASK: tl.constexpr,  # 0: n is a multiple of what a program takes; 8: of 8; else 1
    SHUFFLE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    offs = rows[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # [ROWS, BLOCK_SIZE]
    left = n - first * BLOCK_SIZE  # elements from this program's first on
    x_ptrs = x_ptr + first * BLOCK_SIZE + offs
    if MASK == 0:
        x = tl.load(x_ptrs)
    else:  # whole groups of MASK elements are in or out, and so one load
        x = tl.load(x_ptrs, mask=offs // MASK * MASK < left, other=0.0)
    x = x.to(tl.float32)
    absmax = tl.reduce(tl.abs(x), 1, _larger)
    absmax = tl.where(absmax < SMALLEST, 0.0, absmax)
    tl.store(absmax_ptr + first + rows, absmax, mask=rows * BLOCK_SIZE < left)
    # A block taken as zero keeps its zeros and subnormals, far inside the bucket of code 7.
    scale = reciprocal(tl.where(absmax == 0.0, 1.0, absmax), SHUFFLE)
    pairs = (x * scale[:, None]).reshape([ROWS, BLOCK_SIZE // 2, 2])
    even, odd = tl.split(pairs)  # [ROWS, BLOCK_SIZE / 2]
    high = encode(even, thresholds_ptr, bases_ptr, SHUFFLE)
    low = encode(odd, thresholds_ptr, bases_ptr, SHUFFLE)
    packed = ((high << 4) | low).to(tl.uint8)
    byte_offs = rows[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    packed_ptrs = packed_ptr + first * (BLOCK_SIZE // 2) + byte_offs
    if MASK == 0:
        tl.store(packed_ptrs, packed)
    else:
        group: tl.constexpr = MASK // 2 if MASK > 1 else 1
        tl.store(packed_ptrs, packed, mask=byte_offs // group * (2 * group) < left)


def quantize(
    w: Tensor, block_size: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize w; arguments and results as in nf4/reference/quantize.py."""
    x = w.contiguous()
    n = x.numel()
    if out is None:
        packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
        absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    else:
        packed, absmax = out
    if n:
        mask = 0 if n % max(TILE, block_size) == 0 else 8 if n % 8 == 0 else 1
        taken = max(MASKED_TILE if mask else TILE, block_size)  # by a program
        tables = (bucket_thresholds(x.device), bucket_bases(x.device))
        _form(block_size, mask)((-(-n // taken),), x, packed, absmax, *tables, n)
    return packed, absmax


@forgettable
@lru_cache
def _form(block_size: int, mask: int) -> Launch:
    rows = max((MASKED_TILE if mask else TILE) // block_size, 1)
    return Launch(_quantize_kernel, {"BLOCK_SIZE": block_size, "ROWS": rows, "MASK": mask})


def variants() -> list[Variant]:
    """Return the compilations to report on: two dtypes, whole and masked, and the longest block."""
    masks = {0: "", 8: ", masked", 1: ", odd count"}
    cases = [(64, 0, "bf16"), (64, 8, "bf16"), (64, 1, "bf16"), (64, 0, "fp32"), (4096, 0, "bf16")]
    return [
        Variant(
            f"quantize, block {block_size}, {dtype}{masks[mask]}",
            _form(block_size, mask),
            max(MASKED_TILE if mask else TILE, block_size),
            {"x_ptr": f"*{dtype}", "absmax_ptr": "*fp32"},
            indivisible=("n",) if mask == 1 else (),
        )
        for block_size, mask, dtype in cases
    ]
