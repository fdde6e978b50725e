"""Repack a quantized matrix between rows and fragments; orders as in nf4/reference/repack.py.

One program takes a tile of 16 rows and 256 columns: 2048 bytes, each read from where the other
order has it and written with its nibbles swapped. Scales are reordered by PyTorch. A conversion is
done once a weight; it moves 0.5 bytes in and out an element.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..reference.repack import reorder_scales
from ..tensor import Weight
from ..tools.caches import forgettable
from ._aot import Variant
from ._launch import Launch

TILE_COLUMNS = 256


@triton.jit
def _repack_kernel(
    in_ptr,  # uint8 [rows, columns / 2]
    out_ptr,  # uint8 [rows, columns / 2]
    row_bytes,  # columns / 2
    TO_FRAGMENTS: tl.constexpr,
    TILES: tl.constexpr,  # tiles of 64 columns a program
):
    first_tile = tl.program_id(1) * TILES
    first_row = tl.program_id(0).to(tl.int64) * 16
    i = tl.arange(0, TILES * 512)
    # Byte i in fragments: tile, g, t, r, h, b, from the high end; b is the place in the word.
    tile, g, t, r, h, b = i // 512, i // 64 % 8, i // 16 % 4, i // 8 % 2, i // 4 % 2, i % 4
    in_rows = (8 * r + g) * row_bytes + (first_tile + tile) * 32 + 16 * h + 4 * b + t
    mask = (first_tile + tile) * 32 < row_bytes
    start = first_row * row_bytes
    in_fragments = first_tile * 512 + i
    if TO_FRAGMENTS:
        byte = tl.load(in_ptr + start + in_rows, mask=mask, other=0)
        tl.store(out_ptr + start + in_fragments, (byte << 4) | (byte >> 4), mask=mask)
    else:
        byte = tl.load(in_ptr + start + in_fragments, mask=mask, other=0)
        tl.store(out_ptr + start + in_rows, (byte << 4) | (byte >> 4), mask=mask)


def repack(weight: Weight, layout: str) -> Weight:
    """Return a matrix in the other layout; arguments as in nf4/reference/repack.py."""
    rows, columns = weight.shape
    out = torch.empty_like(weight.packed, memory_format=torch.contiguous_format)
    grid = (rows // 16, -(-columns // TILE_COLUMNS))
    _form(layout == "fragments")(grid, weight.packed.contiguous(), out, columns // 2)
    absmax = reorder_scales(weight.absmax, rows, layout)
    return weight._replace(packed=out, absmax=absmax, layout=layout)


@forgettable
@lru_cache
def _form(to_fragments: bool) -> Launch:
    constants = {"TO_FRAGMENTS": to_fragments, "TILES": TILE_COLUMNS // 64}
    return Launch(_repack_kernel, constants)


def variants() -> list[Variant]:
    """Return the compilations to report on: both directions."""
    types = {"in_ptr": "*u8", "out_ptr": "*u8"}
    directions = {"fragments": True, "rows": False}
    return [
        Variant(f"repack, to {layout}", _form(to_fragments), 16 * TILE_COLUMNS, types)
        for layout, to_fragments in directions.items()
    ]
