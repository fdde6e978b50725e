"""Repack a quantized matrix between rows and fragments, the order that tensor cores read.

rows        bitsandbytes' order: byte i holds elements 2i (high nibble) and 2i + 1; absmax in the
            order of the blocks.
fragments   tiles of 16 rows and 64 columns, 512 bytes each. The lane 4g + t of a warp owns 16
            bytes, four words w = 2 r + h; nibble 4j + 2c + e of a word, from the low end, is the
            element of row 8r + g and column 32h + 16j + 8c + 2t + e: the left operand of a 16-bit
            matrix product (PTX manual, section 9.7.14). absmax by groups of four columns of blocks:
            the four scales of a row are neighbours, one word of codes, and beside them are those
            of the next row. Columns left over lie one after another.

Both have the same size and hold the same codes. W ``[N, K]`` can be in fragments if N is a multiple
of 16, and K of 64 and of the block size.
"""

import torch
from torch import Tensor

from nf4.tensor import Weight


def repack(weight: Weight, layout: str) -> Weight:
    """Return a matrix in a layout, "rows" or "fragments"; itself if it is in that already."""
    if weight.layout == layout:
        return weight
    rows, columns = weight.shape
    packed = weight.packed
    if layout == "fragments":
        # row tile, r, g, column tile, h, two bits of the nibble's place, t
        tiles = packed.view(rows // 16, 2, 8, columns // 64, 2, 4, 4).permute(0, 3, 2, 6, 1, 4, 5)
    else:
        tiles = packed.view(rows // 16, columns // 64, 8, 4, 2, 2, 4).permute(0, 4, 2, 1, 5, 6, 3)
    swapped = (tiles << 4 | tiles >> 4).reshape(rows, columns // 2)  # odd columns were low nibbles
    absmax = reorder_scales(weight.absmax, rows, layout)
    return weight._replace(packed=swapped, absmax=absmax, layout=layout)


def reorder_scales(absmax: Tensor, rows: int, layout: str) -> Tensor:
    """Return the scales of a matrix, or their codes, in a layout, given them in the other."""
    blocks = absmax.numel() // rows
    grouped = blocks // 4 * 4
    if layout == "fragments":
        scales = absmax.view(rows, blocks)
        groups = scales[:, :grouped].reshape(rows, grouped // 4, 4).transpose(0, 1)
        return torch.cat([groups.reshape(-1), scales[:, grouped:].T.reshape(-1)])
    groups = absmax[: rows * grouped].view(grouped // 4, rows, 4).transpose(0, 1)
    left = absmax[rows * grouped :].view(blocks - grouped, rows).T
    return torch.cat([groups.reshape(rows, grouped), left], dim=1).reshape(-1)
