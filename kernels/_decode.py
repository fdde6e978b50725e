"""Decode packed NF4 codes: the one lookup of sixteen levels that every kernel uses.

SHUFFLE picks how. True, for NVIDIA: lane i of a warp holds level i mod 16, and a nibble is the lane
to read from; one ``shfl.sync`` a weight, 5 to 7 instructions in all (bench/results/compile.md).
False, for every other device and for the interpreter: ``tl.gather`` on a tensor of 16 levels. Both
give the fp32 levels exactly. Inline assembly must not be compiled for AMD, so the caller says
which, as a constexpr.
"""

import struct

import triton
import triton.language as tl

from ..codebook import NF4_LEVELS
from ._lanes import select_by_lane


def _lane_level_asm() -> str:
    bits = ["0f" + struct.pack(">f", level).hex().upper() for level in NF4_LEVELS]
    code, level = select_by_lane(bits, "f32", "v")
    return f"{{\n{code}\nmov.b32 $0, {level};\n}}"


def _shuffle_asm() -> str:
    """Return PTX that reads the levels of the eight nibbles of $8 from the lanes that hold them.

    $0 to $3 are the levels of the high nibbles of bytes 0 to 3, $4 to $7 of the low ones; $9 is
    this lane's level. The segment operand 0x101f makes shuffles 16 lanes wide: the bits above a
    nibble need no masking.
    """
    lines = [".reg .b32 n0, n1, n2, n3, n4, n5, n6, n7;", "mov.b32 n4, $8;"]
    for byte in range(4):
        for out, shift in ((byte, 8 * byte + 4), (byte + 4, 8 * byte)):
            if shift:
                lines.append(f"shr.u32 n{out}, $8, {shift};")
    lines += [f"shfl.sync.idx.b32 ${i}, $9, n{i}, 0x101f, 0xffffffff;" for i in range(8)]
    return "{\n" + "\n".join(lines) + "\n}"


LANE_LEVEL = tl.constexpr(_lane_level_asm())
SHUFFLE_LEVELS = tl.constexpr(_shuffle_asm())
# Four bytes share one register; the lane's level comes once for each of them.
SHUFFLE_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r")


@triton.jit
def decode_bytes(packed, levels_ptr, SHUFFLE: tl.constexpr):
    """Return the fp32 levels of the high and of the low nibbles of packed, uint8 of any shape.

    levels_ptr points to the 16 fp32 levels; it is read only without SHUFFLE.
    """
    if SHUFFLE:
        level = tl.inline_asm_elementwise(
            LANE_LEVEL,
            "=r,r",
            [tl.zeros(packed.shape, tl.int32)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            SHUFFLE_LEVELS,
            SHUFFLE_CONSTRAINTS,
            [packed, level],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        levels = tl.load(levels_ptr + tl.arange(0, 16))  # [16]
        count: tl.constexpr = packed.numel
        codes = packed.to(tl.int32).reshape([count])
        high = tl.gather(levels, codes >> 4, 0).reshape(packed.shape)
        low = tl.gather(levels, codes & 15, 0).reshape(packed.shape)
        return high, low


@triton.jit
def decode_absmax(absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, first, rows, blocks):
    """Return the fp32 scales of blocks first + rows, decoded if they are double-quantized.

    The caller compiles without contraction: map * absmax2 is rounded before offset is added. All
    rows share one entry of absmax2: their number divides 256, and so do the steps of first.
    """
    mask = first + rows < blocks
    if absmax_ptr.dtype.element_ty == tl.uint8:
        code = tl.load(absmax_ptr + first + rows, mask=mask, other=0)
        d = tl.load(map_ptr + code.to(tl.int32)) * tl.load(absmax2_ptr + first // 256)
        return d + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + first + rows, mask=mask, other=0.0)
