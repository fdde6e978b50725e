"""Quantize to NF4 in one pass over the elements, a block at a time.

    absmax[b] = max |x| over block b      code[i] = #{thresholds < x[i] * (1 / absmax)}

Equal to nf4/reference/quantize.py in every bit.
"""

import numpy as np
import torch
from torch import Tensor

from nf4.codebook import SMALLEST_ABSMAX, nf4_thresholds
from nf4.cpu._lanes import encode_block
from nf4.cpu._memory import array_of, new_empty
from nf4.cpu._threads import fork, spread
from nf4.cpu.dequantize import compiled

SLAB = 1 << 20  # elements, whole blocks of every size
GRAIN = 1 << 15  # elements worth a thread of their own: 20 microseconds of work


# Writes blocks begin to end of a slab. The last block of a tensor may be short, its last byte too.
# Each inner loop does one thing to a whole block, for the compiler to take many elements at a time.
@compiled
def _loop(fp32, bf16, thresholds, block_size, packed, absmax, begin, end):  # type: ignore[no-untyped-def]
    half = block_size // 2
    x = np.empty(block_size, np.float32)
    bits = x.view(np.int32)
    last = np.empty(half, np.uint8)
    most = np.empty(1, np.int32)
    for b in range(begin, end):
        if len(bf16):
            halves = bf16[b * block_size : (b + 1) * block_size]
            count = len(halves)
            for i in range(count):
                bits[i] = np.int32(halves[i]) << 16
        else:
            block = fp32[b * block_size : (b + 1) * block_size]
            count = len(block)
            for i in range(count):
                x[i] = block[i]
        for i in range(count, block_size):  # an odd count is padded with a zero
            x[i] = np.float32(0)
        largest_bits = np.int32(0)
        for i in range(block_size):  # as integers: those of a NaN are larger than all others
            largest_bits = max(largest_bits, bits[i] & np.int32(0x7FFFFFFF))
        most[0] = largest_bits
        largest = most.view(np.float32)[0]
        if largest < np.float32(SMALLEST_ABSMAX):
            largest = np.float32(0)
        absmax[b] = largest
        scale = np.float32(0)
        if largest != np.float32(0):
            scale = np.float32(1) / largest
        if count == block_size:
            encode_block(x, scale, thresholds, half, packed, b * half)
        else:
            encode_block(x, scale, thresholds, half, last, 0)
            bytes_ = packed[b * half :]
            for i in range((count + 1) // 2):
                bytes_[i] = last[i]


@compiled
def _share(fp32, bf16, thresholds, block_size, packed, absmax, begin, end, team):  # type: ignore[no-untyped-def]
    args = (fp32, bf16, thresholds, block_size, packed, absmax)
    fork(_loop, args, begin, end, team)


def quantize(
    w: Tensor, block_size: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize w; arguments and results as in nf4/reference/quantize.py."""
    x = w.detach().reshape(-1)
    n = x.numel()
    blocks = -(-n // block_size)
    packed = new_empty(((n + 1) // 2,), torch.uint8)
    absmax = torch.empty(blocks, dtype=torch.float32, device="cpu")
    thresholds = np.array([*nf4_thresholds(), np.inf], np.float32)
    none32, none16 = np.empty(0, np.float32), np.empty(0, np.uint16)
    # What is neither fp32 nor bf16 becomes fp32 a slab at a time
    step = max(n, 1) if w.dtype in (torch.float32, torch.bfloat16) else SLAB
    for begin in range(0, n, step):
        slab = x[begin : begin + step].contiguous()
        if w.dtype == torch.bfloat16:
            fp32, bf16 = none32, array_of(slab.view(torch.uint16))
        else:
            fp32, bf16 = array_of(slab.float()), none16
        spread(
            _share,
            range(-(-slab.numel() // block_size)),
            GRAIN // block_size,
            fp32,
            bf16,
            thresholds,
            block_size,
            array_of(packed[begin // 2 :]),
            array_of(absmax[begin // block_size :]),
        )
    return (packed, absmax) if out is None else (out[0].copy_(packed), out[1].copy_(absmax))
