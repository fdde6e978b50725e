"""PTX that gives every lane of a warp its own entry of a table."""

from collections.abc import Sequence

import torch
from torch import Tensor


def has_shuffle(x: Tensor) -> bool:
    """Return whether kernels on x may use NVIDIA's warp shuffles: what SHUFFLE is to be."""
    return x.is_cuda and torch.version.hip is None


def select_by_lane(entries: Sequence[str], kind: str, name: str) -> tuple[str, str]:
    """Return PTX that selects this lane's entry, and the register it ends up in.

    Args:
        entries: PTX immediates; their number is a power of two, lane i gets entry i modulo it.
        kind: PTX type of the entries, such as ``"f32"``.
        name: prefix of the registers declared, so that two tables fit in one body.
    """
    bits = len(entries).bit_length() - 1
    lines = [f".reg .b32 {name}_lane, {name}_bit;", f"mov.u32 {name}_lane, %laneid;"]
    level = list(entries)
    for b in range(bits):
        p = f"{name}_p{b}"
        lines.append(f".reg .pred {p};")
        lines.append(f"and.b32 {name}_bit, {name}_lane, {1 << b};")
        lines.append(f"setp.ne.u32 {p}, {name}_bit, 0;")
        above = [f"{name}_{b}_{i}" for i in range(len(level) // 2)]
        lines.append(f".reg .{kind} {', '.join(above)};")
        for register, low, high in zip(above, level[0::2], level[1::2], strict=True):
            lines.append(f"selp.{kind} {register}, {high}, {low}, {p};")
        level = above
    return "\n".join(lines), level[0]
