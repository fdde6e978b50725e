"""Dequantize NF4 in one launch: out[i] = round_to_dtype(levels[code[i]] * absmax[i // block_size]).

One program takes 8192 elements: their bytes, and the scales of the blocks they lie in, decoded here
if they are double-quantized. One fp32 multiply, one rounding to nearest even, as in
nf4/reference/dequantize.py. A thread loads 4 bytes and stores 8 elements: 128 bits of bf16. Moves
0.5 bytes in, 2 out and 0.016 of scales per element (bf16, block 64, double quantization). A weight
in fragments goes through kernels/_merge.py.
Source: QLoRA, section 3 (https://arxiv.org/abs/2305.14314).
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import absmax_map, nf4_levels
from ..tensor import Weight
from ..tools.caches import forgettable
from ._aot import Variant
from ._decode import decode_absmax, decode_bytes
from ._launch import Launch
from ._merge import dense_launch, merge_variants

TILE_BYTES = 4096


@triton.jit
def _dequantize_kernel(
    packed_ptr,  # uint8 [bytes]
    absmax_ptr,  # float32 [blocks], or uint8 codes
    absmax2_ptr,  # float32 [ceil(blocks / 256)], unused for float32 absmax
    offset_ptr,  # float32 [], unused for float32 absmax
    map_ptr,  # float32 [256]
    levels_ptr,  # float32 [16]
    out_ptr,  # [n]
    n,
    BLOCK_BYTES: tl.constexpr,  # half the block size
    ROWS: tl.constexpr,  # blocks a program; divides 256
    MASK_BYTES: tl.constexpr,  # 0: n is a multiple of what a program takes; 4: of 8; else 1
    SHUFFLE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    offs = rows[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]  # [ROWS, BLOCK_BYTES]
    left = n - first * (2 * BLOCK_BYTES)  # elements from this program's first on
    # At most 4 bytes a load, so that the 8 elements of a thread are one store.
    packed_ptrs = tl.max_contiguous(packed_ptr + first * BLOCK_BYTES + offs, (1, 4))
    if MASK_BYTES == 0:
        packed = tl.load(packed_ptrs)
    else:  # whole groups of MASK_BYTES bytes are in or out, and so one load
        packed = tl.load(packed_ptrs, mask=offs // MASK_BYTES * (2 * MASK_BYTES) < left, other=0)
    high, low = decode_bytes(packed, levels_ptr, SHUFFLE)
    blocks = tl.cdiv(n, 2 * BLOCK_BYTES)
    absmax = decode_absmax(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, first, rows, blocks)
    absmax = absmax[:, None]
    out = tl.join(high * absmax, low * absmax).reshape([ROWS, 2 * BLOCK_BYTES])
    out = out.to(out_ptr.dtype.element_ty)
    out_offs = rows[:, None] * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)[None, :]
    out_ptrs = out_ptr + first * (2 * BLOCK_BYTES) + out_offs
    if MASK_BYTES == 0:
        tl.store(out_ptrs, out)
    else:
        group: tl.constexpr = MASK_BYTES if MASK_BYTES == 1 else 8
        tl.store(out_ptrs, out, mask=out_offs // group * group < left)


def dequantize(weight: Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Dequantize to a dense tensor; arguments as in nf4/reference/dequantize.py."""
    if out is not None and not out.is_contiguous():
        return out.copy_(dequantize(weight, dtype))
    weight = weight.contiguous()
    packed, absmax, absmax2, offset, shape, block_size, layout = weight
    n, device = math.prod(shape), packed.device
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
    if n == 0:
        return out
    if layout == "fragments":
        form, arguments = dense_launch(weight, None, out)
        form(*arguments)
        return out
    taken = max(TILE_BYTES, block_size // 2) * 2  # by a program
    mask_bytes = 0 if n % taken == 0 else 4 if n % 8 == 0 else 1
    tables = (absmax_map(device), nf4_levels(device))
    _form(block_size, mask_bytes)(
        (-(-n // taken),), packed, absmax, absmax2, offset, *tables, out, n
    )
    return out


@forgettable
@lru_cache
def _form(block_size: int, mask_bytes: int) -> Launch:
    block_bytes = block_size // 2
    constants = {
        "BLOCK_BYTES": block_bytes,
        "ROWS": max(TILE_BYTES // block_bytes, 1),
        "MASK_BYTES": mask_bytes,
    }
    return Launch(_dequantize_kernel, constants)


def variants() -> list[Variant]:
    """Return the compilations to report on: double-quantized to bf16, and the longest block."""
    masks = {0: "", 4: ", masked", 1: ", odd count"}
    cases = [(64, 0, "bf16"), (64, 4, "bf16"), (64, 1, "bf16"), (64, 0, "fp32"), (4096, 0, "bf16")]
    made = [
        Variant(
            f"dequantize, block {block_size}, {dtype}{masks[mask_bytes]}",
            _form(block_size, mask_bytes),
            max(2 * TILE_BYTES, block_size),
            {"out_ptr": f"*{dtype}"},
            indivisible=("n",) if mask_bytes == 1 else (),
        )
        for block_size, mask_bytes, dtype in cases
    ]
    return made + merge_variants("dequantize, fragments", (0,))
