"""Decode a weight held in fragments, tile by tile, in the registers where tensor cores want it.

A tile of 16 rows and 64 columns is 128 words, four neighbours a lane (nf4/reference/repack.py):
one 128-bit load, and no value leaves its lane. ``tl.dot(tile, x)`` takes such a tile as its left
factor, and its accumulator has the same places, so that neither needs a layout conversion.
"""

import triton
import triton.language as tl

from ._decode import LANE_LEVEL


def _shuffle_word_asm() -> str:
    """Return PTX for the levels $0 to $7 of the nibbles of word $8, by shuffle from $9."""
    lines = [".reg .b32 n;"]
    for nibble in range(8):
        lines.append(f"shr.u32 n, $8, {4 * nibble};" if nibble else "mov.b32 n, $8;")
        lines.append(f"shfl.sync.idx.b32 ${nibble}, $9, n, 0x101f, 0xffffffff;")
    return "{\n" + "\n".join(lines) + "\n}"


SHUFFLE_WORD = tl.constexpr(_shuffle_word_asm())
SHUFFLE_WORD_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 2))


@triton.jit
def as_words(packed_ptr):
    """Return a pointer to bytes of a weight in fragments as one to int32 words of four."""
    return packed_ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def lane_levels(like):
    """Return this lane's level, fp32 in the shape of a tensor; computed once a thread."""
    zero = tl.zeros(like.shape, tl.int32)
    return tl.inline_asm_elementwise(
        LANE_LEVEL, "=r,r", [zero], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def decode_words(words, levels_ptr, SHUFFLE: tl.constexpr):
    """Return the fp32 levels of the eight nibbles of int32 words, from the low end: eight tensors.

    levels_ptr points to the 16 fp32 levels; it is read only without SHUFFLE.
    """
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            SHUFFLE_WORD,
            SHUFFLE_WORD_CONSTRAINTS,
            [words, lane_levels(words)],
            dtype=(tl.float32,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        levels = tl.load(levels_ptr + tl.arange(0, 16))  # [16]
        count: tl.constexpr = words.numel
        out = ()
        for nibble in tl.static_range(8):
            codes = ((words >> (4 * nibble)) & 15).reshape([count])
            out = out + (tl.gather(levels, codes, 0).reshape(words.shape),)
        return out


@triton.jit
def as_tile(values, ROWS: tl.constexpr):
    """Arrange eight tensors ``[tiles, g, t, r, h]``, i = 4j + 2c + e, as ``[ROWS, 64]``."""
    j0 = tl.join(tl.join(values[0], values[1]), tl.join(values[2], values[3]))
    j1 = tl.join(tl.join(values[4], values[5]), tl.join(values[6], values[7]))
    joined = tl.join(j0, j1)  # [tiles, g, t, r, h, e, c, j]
    return tl.permute(joined, (0, 3, 1, 4, 7, 6, 2, 5)).reshape([ROWS, 64])


@triton.jit
def load_codes(
    absmax_ptr,  # float32 scales or their uint8 codes, in groups of four columns of blocks
    absmax2_ptr,  # float32 [ceil(blocks / 256)], unused for float32 scales
    offs_n,  # int32 [n], rows
    column,  # of blocks
    columns,  # of blocks, K / block size
    N,
    WHOLE: tl.constexpr,  # whether columns are whole groups of four
):
    """Return the codes of the scales at some rows and one column, and their absmax2.

    Of float32 scales it is the scales themselves, twice.
    """
    at = (column // 4 * 4).to(tl.int64) * N + 4 * offs_n + column % 4
    if not WHOLE:
        at = tl.where(column < columns // 4 * 4, at, column.to(tl.int64) * N + offs_n)
    code = tl.load(absmax_ptr + at)
    if code.dtype == tl.uint8:
        return code, tl.load(absmax2_ptr + ((offs_n * columns + column) >> 8))
    else:
        return code, code


@triton.jit
def decode_scales(code, map_ptr, offset):
    """Return the fp32 scales of what `load_codes` has returned.

    The caller compiles without contraction: map * absmax2 is rounded before offset is added.
    """
    if code[0].dtype == tl.uint8:
        return tl.load(map_ptr + code[0].to(tl.int32)) * code[1] + offset
    else:
        return code[0]


@triton.jit
def load_scales(
    absmax_ptr, absmax2_ptr, map_ptr, offset, offs_n, column, columns, N, WHOLE: tl.constexpr
):
    """Return the fp32 scales at some rows and one column; arguments as of `load_codes`."""
    codes = load_codes(absmax_ptr, absmax2_ptr, offs_n, column, columns, N, WHOLE)
    return decode_scales(codes, map_ptr, offset)


@triton.jit
def load_group(absmax_ptr, offs_n, group, N):
    """Return the codes of four neighbouring blocks of some rows, one int32 word a row.

    For codes of whole groups alone, as K // BLOCK_SIZE a multiple of 4 has them.
    """
    return tl.load(as_words(absmax_ptr) + group.to(tl.int64) * N + offs_n)


@triton.jit
def load_group_scales(absmax2_ptr, map_ptr, offset, offs_n, codes, group, K):
    """Return the fp32 scales of the four blocks of a group, of which `load_group` has the codes.

    They share one entry of absmax2. The caller compiles without contraction.
    """
    absmax2 = tl.load(absmax2_ptr + ((offs_n * (K // 64) + 4 * group) >> 8))
    scales = ()
    for i in tl.static_range(4):
        scales = scales + (load_map(map_ptr, codes, i) * absmax2 + offset,)
    return scales


@triton.jit
def load_map(map_ptr, codes, i: tl.constexpr):
    """Return the map's entries of the i-th codes of words of four."""
    return tl.load(map_ptr + ((codes >> (8 * i)) & 255))


@triton.jit
def decode_tile(
    words,  # int32 [ROWS / 16, 128]
    scale0,  # fp32 [ROWS], of columns 0 to 31
    scale1,  # fp32 [ROWS], of columns 32 to 63
    levels_ptr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """Return level times scale, ``[ROWS, 64]``, rounded once to DTYPE."""
    tiles: tl.constexpr = ROWS // 16
    levels = decode_words(words.reshape([tiles, 8, 4, 2, 2]), levels_ptr, SHUFFLE)
    scale = tl.join(scale0, scale1).reshape([tiles, 2, 8, 2])  # [tiles, r, g, h]
    scale = tl.permute(scale, (0, 2, 1, 3)).reshape([tiles, 8, 1, 2, 2])
    out = ()
    for i in tl.static_range(8):
        out = out + ((levels[i] * scale).to(DTYPE),)
    return as_tile(out, ROWS)
