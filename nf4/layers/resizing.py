"""Give a 4-bit matrix more rows or fewer, and leave the bytes of all others as they are.

Blocks and groups run over the whole matrix, so the last of either may hold old rows and new ones:
there the scale stays, and new elements take the nearest level of it.
"""

import torch
from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE, LARGEST_ABSMAX, SMALLEST_ABSMAX
from nf4.functional import quantize, scales_of, to_rows
from nf4.reference.dequantize_absmax import dequantize_absmax
from nf4.reference.quantize import codes_of, pack
from nf4.reference.quantize_absmax import absmax_codes
from nf4.tensor import NF4Tensor, packed_shape


def resized(q: NF4Tensor, weight: Tensor) -> NF4Tensor:
    """Return a 4-bit matrix with the number of rows that a dense one has.

    Args:
        q: ``[N, K]``, K even; left unchanged.
        weight: ``[M, K]``; rows from N on are quantized, the others are not looked at.

    Returns:
        ``[M, K]`` in rows, of the form of q; the first min(M, N) rows have the same bytes and
        scales.

    Raises:
        ValueError: the sizes do not fit, K is odd, or a new row holds NaN or an infinity.
    """
    if weight.ndim != 2 or len(q.shape) != 2 or weight.shape[1] != q.shape[1] or q.shape[1] % 2:
        raise ValueError(
            f"weight: expected [M, K] for a matrix [N, K], K even, got {tuple(weight.shape)} for "
            f"{tuple(q.shape)}"
        )
    q = to_rows(q)
    rows = min(weight.shape[0], q.shape[0])
    added = weight.detach()[rows:].reshape(-1)
    if not added.isfinite().all():
        raise ValueError("weight: expected finite values in new rows, got NaN or an infinity")
    blocks = -(-rows * q.shape[1] // q.block_size)
    groups = None if q.absmax2 is None else q.absmax2[: -(-blocks // ABSMAX_BLOCK_SIZE)]
    packed, scales = [q.packed[:rows].reshape(-1)], [q.absmax[:blocks]]
    if added.numel():
        within = min(blocks * q.block_size - rows * q.shape[1], added.numel())
        forced = scales_of(q)[blocks - 1 : blocks].expand(within)
        new = quantize(added[within:], q.block_size, double_quant=False)
        absmax = new.absmax
        if groups is not None and q.offset is not None:
            absmax, groups = _encode_scales(absmax, groups, q.offset, blocks)
            shared = absmax[: -blocks % ABSMAX_BLOCK_SIZE]  # in the last group that there was
            own = dequantize_absmax(
                shared, groups[(blocks - 1) // ABSMAX_BLOCK_SIZE :][:1], q.offset
            )
            forced = torch.cat([forced, own.repeat_interleave(q.block_size)])[: added.numel()]
        tail = new.packed.reshape(-1)[(forced.numel() - within) // 2 :]
        packed += [pack(codes_of(added[: forced.numel()].float(), forced)), tail]
        scales.append(absmax)
    shape = torch.Size(weight.shape)
    parts = torch.cat(packed).view(packed_shape(shape)), torch.cat(scales), groups, q.offset
    copies = (None if part is None else part.detach().clone() for part in parts)
    return q.with_parts(copies, shape=shape)


def _encode_scales(
    absmax: Tensor, groups: Tensor, offset: Tensor, blocks: int
) -> tuple[Tensor, Tensor]:
    """Return the codes of scales that come after a number of others, and all groups' absmax2."""
    shared = -blocks % ABSMAX_BLOCK_SIZE  # places in the last group that there is
    d = (absmax - offset).clamp(-LARGEST_ABSMAX, LARGEST_ABSMAX)
    new = torch.split(d[shared:], ABSMAX_BLOCK_SIZE)
    largest = torch.stack([part.abs().amax() for part in new]) if len(new[0]) else d[:0]
    groups = torch.cat([groups, torch.where(largest < SMALLEST_ABSMAX, 0.0, largest)])
    place = (blocks + torch.arange(d.numel(), device=d.device)) // ABSMAX_BLOCK_SIZE
    return absmax_codes(d, groups[place]), groups
