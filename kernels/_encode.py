"""Encode: the NF4 code of scaled values, the one search that every quantizer uses.

[-1, 1] is cut into 32 equal buckets. No bucket holds two of the 15 thresholds (the closest are
0.080 apart, a bucket is 0.0625 wide), so the code is the bucket's base plus one above its
threshold. SHUFFLE as in `_decode`: the tables sit in the lanes of a warp, or in tensors read by
``tl.gather``.
"""

import struct
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebook import nf4_thresholds
from ..tools.caches import forgettable
from ._lanes import select_by_lane

BUCKETS = 32
NO_THRESHOLD = 2.0  # above every scaled value


def _buckets() -> tuple[list[float], list[int]]:
    """Return the threshold inside each bucket, and the number of thresholds below it."""
    thresholds, bases = [], []
    for i in range(BUCKETS):
        low, high = -1 + i / 16, -1 + (i + 1) / 16
        inside = [t for t in nf4_thresholds() if low <= t < high]
        if len(inside) > 1:
            raise ValueError(f"bucket {i}: expected at most one threshold, got {inside}")
        thresholds.append(inside[0] if inside else NO_THRESHOLD)
        bases.append(sum(t < low for t in nf4_thresholds()))
    return thresholds, bases


BUCKET_THRESHOLDS, BUCKET_BASES = _buckets()


@forgettable
@lru_cache
def bucket_thresholds(device: torch.device) -> Tensor:
    """Return the threshold of each bucket as float32 ``[32]`` on a device."""
    return torch.tensor(BUCKET_THRESHOLDS, dtype=torch.float32, device=device)


@forgettable
@lru_cache
def bucket_bases(device: torch.device) -> Tensor:
    """Return the base code of each bucket as int32 ``[32]`` on a device."""
    return torch.tensor(BUCKET_BASES, dtype=torch.int32, device=device)


def _lane_buckets_asm() -> str:
    bits = ["0x" + struct.pack(">f", t).hex() for t in BUCKET_THRESHOLDS]
    thresholds, threshold = select_by_lane(bits, "b32", "t")
    bases, base = select_by_lane([str(b) for b in BUCKET_BASES], "b32", "b")
    return f"{{\n{thresholds}\nmov.b32 $0, {threshold};\n{bases}\nmov.b32 $1, {base};\n}}"


LANE_BUCKETS = tl.constexpr(_lane_buckets_asm())
# m = (x + 1) / 2, clamped to [0, 1]: where absmax is above 2^126 its reciprocal is subnormal and x
# may leave [-1, 1] by a little. Then m * (32 - 2^-19) + 2^23, rounded down, has the bucket in its
# low bits. Both steps may move an x just above an edge one bucket down; no threshold lies between.
SHUFFLE_SEARCH = tl.constexpr(
    """{
.reg .b32 i, t, b; .reg .f32 m; .reg .pred p;
fma.rm.sat.f32 m, $1, 0f3F000000, 0f3F000000;
fma.rm.f32 m, m, 0f41FFFFFF, 0f4B000000;
mov.b32 i, m;
shfl.sync.idx.b32 t, $2, i, 0x1f, 0xffffffff;
shfl.sync.idx.b32 b, $3, i, 0x1f, 0xffffffff;
setp.gt.f32 p, $1, t;
@p add.u32 b, b, 1;
mov.b32 $0, b;
}"""
)


@triton.jit
def reciprocal(x, SHUFFLE: tl.constexpr):
    """Return 1 / x of fp32, correctly rounded; on NVIDIA in fewer instructions than a division."""
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            "rcp.rn.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.math.div_rn(1.0, x)


@triton.jit
def encode(x, thresholds_ptr, bases_ptr, SHUFFLE: tl.constexpr):
    """Return the int32 codes of x, fp32 in [-1, 1] of any shape.

    thresholds_ptr and bases_ptr point to the tables of the 32 buckets; they are read only without
    SHUFFLE.
    """
    if SHUFFLE:
        threshold, base = tl.inline_asm_elementwise(
            LANE_BUCKETS,
            "=r,=r,r",
            [tl.zeros(x.shape, tl.int32)],
            dtype=(tl.float32, tl.int32),
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            SHUFFLE_SEARCH,
            "=r,r,r,r",
            [x, threshold, base],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        count: tl.constexpr = x.numel
        lane = tl.arange(0, 32)
        # Rounding may lift x into the next bucket only where no threshold lies between. Both ends
        # are clamped: a NaN may become any integer.
        bucket = (x * 16.0 + 16.0).to(tl.int32)
        bucket = tl.maximum(tl.minimum(bucket, 31), 0).reshape([count])
        threshold = tl.gather(tl.load(thresholds_ptr + lane), bucket, 0).reshape(x.shape)
        base = tl.gather(tl.load(bases_ptr + lane), bucket, 0).reshape(x.shape)
        return base + (x > threshold).to(tl.int32)
