"""Decode words of eight codes to 16-bit levels: the cheapest lookup, for the memory-bound product.

A level is rounded to the dtype of x; scales are left to the sums. Two ways fill two pipes: SHUFFLE
as in `_decode`, with the 16-bit level in the lane, and PRMT, which looks four nibbles up at once by
picking bytes of the table. Of the four words that a lane reads, one goes by PRMT, by the pipe model
of `_sass` the best mix on sm_90. Both give the same bits, so the mix changes no result.
"""

import torch
import triton
import triton.language as tl

from ..codebook import NF4_LEVELS
from ._lanes import select_by_lane


def _bits(dtype: torch.dtype) -> list[int]:
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device="cpu").to(dtype)
    return [int(b) & 0xFFFF for b in levels.view(torch.int16)]


def _lane_level_asm(dtype: torch.dtype) -> str:
    code, level = select_by_lane([str(b) for b in _bits(dtype)], "b32", "v")
    return f"{{\n{code}\nmov.b32 $0, {level};\n}}"


def _shuffle(word: int, first_out: int) -> list[str]:
    lines = []
    for pair in range(4):
        for e in range(2):
            shift = 8 * pair + 4 * e
            lines.append(f"shr.u32 n{e}, ${word}, {shift};" if shift else f"mov.b32 n0, ${word};")
            lines.append(f"shfl.sync.idx.b32 n{e}, $20, n{e}, 0x101f, 0xffffffff;")
        lines.append(f"prmt.b32 ${first_out + pair}, n0, n1, 0x5410;")
    return lines


def _prmt(word: int, first_out: int, dtype: torch.dtype) -> list[str]:
    """Return PTX that looks a word's nibbles up in the low and high bytes of the 16 levels.

    Two prmt cover the lower and the upper eight levels by the low three bits of four nibbles; a
    third picks between them by the nibbles' bit 3; low and high bytes are then interleaved.
    """
    planes = []
    for shift in (0, 8):
        of_levels = [b >> shift & 255 for b in _bits(dtype)]
        planes.append(
            [f"0x{sum(of_levels[4 * i + j] << 8 * j for j in range(4)):08x}" for i in range(4)]
        )
    lines = [
        f"and.b32 s0, ${word}, 0x77777777;",
        "shr.u32 s1, s0, 16;",
        f"shr.u32 m0, ${word}, 1;",
        "lop3.b32 m0, m0, 0x44444444, 0x32103210, 0xEA;",
        "shr.u32 m1, m0, 16;",
    ]
    for half in range(2):
        for name, plane in zip(("low", "high"), planes, strict=True):
            lines += [
                f"prmt.b32 n0, {plane[0]}, {plane[1]}, s{half};",
                f"prmt.b32 n1, {plane[2]}, {plane[3]}, s{half};",
                f"prmt.b32 {name}, n0, n1, m{half};",
            ]
        for i, selector in enumerate(("0x5140", "0x7362")):
            lines.append(f"prmt.b32 ${first_out + 2 * half + i}, low, high, {selector};")
    return lines


def _words_asm(dtype: torch.dtype) -> str:
    """Return PTX for four words $16 to $19: pairs p of word w, low half first, in $(4p + w)."""
    lines = [".reg .b32 n0, n1, s0, s1, m0, m1, low, high;"]
    for w in range(4):
        body = _prmt(16 + w, 100, dtype) if w == 3 else _shuffle(16 + w, 100)
        for pair in range(4):
            body = [line.replace(f"${100 + pair},", f"${4 * pair + w},") for line in body]
        lines += body
    return "{\n" + "\n".join(lines) + "\n}"


LANE_BF16 = tl.constexpr(_lane_level_asm(torch.bfloat16))
LANE_FP16 = tl.constexpr(_lane_level_asm(torch.float16))
WORDS_BF16 = tl.constexpr(_words_asm(torch.bfloat16))
WORDS_FP16 = tl.constexpr(_words_asm(torch.float16))
# Four words, and the lane's level once for each of them
WORDS_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 8))


@triton.jit
def _pair(word, DTYPE: tl.constexpr):
    """Return both 16-bit halves of int32 words as DTYPE, in a new last dimension."""
    low = word.to(tl.int16).to(DTYPE, bitcast=True)
    high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, high)


@triton.jit
def decode_levels(words, levels_ptr, DTYPE: tl.constexpr, SHUFFLE: tl.constexpr):
    """Return the levels of int32 words in DTYPE: four tensors ``[..., 2]``, two codes of each.

    levels_ptr points to the 16 fp32 levels; it is read only without SHUFFLE.
    """
    if SHUFFLE:
        is_fp16: tl.constexpr = DTYPE.is_fp16()
        LANE: tl.constexpr = LANE_FP16 if is_fp16 else LANE_BF16
        WORDS: tl.constexpr = WORDS_FP16 if is_fp16 else WORDS_BF16
        zero = tl.zeros(words.shape, tl.int32)
        lane = tl.inline_asm_elementwise(LANE, "=r,r", [zero], dtype=tl.int32, is_pure=True, pack=1)
        pairs = tl.inline_asm_elementwise(
            WORDS, WORDS_CONSTRAINTS, [words, lane], dtype=(tl.int32,) * 4, is_pure=True, pack=4
        )
        return (
            _pair(pairs[0], DTYPE),
            _pair(pairs[1], DTYPE),
            _pair(pairs[2], DTYPE),
            _pair(pairs[3], DTYPE),
        )
    else:
        levels = tl.load(levels_ptr + tl.arange(0, 16)).to(DTYPE)  # [16]
        count: tl.constexpr = words.numel
        out = ()
        for pair in tl.static_range(4):
            low = ((words >> (8 * pair)) & 15).reshape([count])
            high = ((words >> (8 * pair + 4)) & 15).reshape([count])
            both = tl.join(tl.gather(levels, low, 0), tl.gather(levels, high, 0))
            out = out + (both.reshape(words.shape + [2]),)
        return out
