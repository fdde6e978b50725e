"""Operators that quantize: quantize, quantize_mse, and quantize_out, which writes to given tensors.

A strided tensor is made contiguous a slab at a time, so that no whole copy of it is held.
"""

from typing import Any

import torch
from torch import Tensor

from nf4.ops.registry import define, nothing, run

_SLAB = 2**22  # elements of a strided tensor that are made contiguous at a time: whole blocks


def _quantize(a: Any) -> tuple[Tensor, Tensor]:
    return _checked(a.w, a.check, *_in_slabs("quantize", a.w, a.block_size))


def _quantize_mse(a: Any) -> tuple[Tensor, Tensor]:
    found = _in_slabs("quantize_mse", a.w, a.block_size, (a.signed, a.weights))
    return _checked(a.w, a.check, *found)


def _quantize_out(a: Any) -> None:
    out = (a.packed.view(-1), a.absmax)
    if a.check:  # nothing is written before the check
        for target, value in zip(out, _quantize(a), strict=True):
            target.copy_(value)
    else:
        _in_slabs("quantize", a.w, a.block_size, out=out)


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    n = a.w.numel()
    return (
        a.w.new_empty((n + 1) // 2, dtype=torch.uint8),
        a.w.new_empty((n + a.block_size - 1) // a.block_size, dtype=torch.float32),
    )


def _in_slabs(
    op: str,
    w: Tensor,
    block_size: int,
    options: tuple[Any, ...] = (),
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize w; a strided one a slab at a time."""
    parts: tuple[Tensor, Tensor]
    if w.numel() <= _SLAB or w.is_contiguous():
        parts = run(op, w, w, block_size, *options, out)
        return parts
    n, k = w.numel(), w.shape[-1]
    if out is None:
        scales = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
        out = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device), scales
    for start in range(0, n, _SLAB):
        stop = min(start + _SLAB, n)
        slab, own = _flat(w, start, stop), options
        if options and options[1] is not None:  # weights of columns
            own = (options[0], options[1][torch.arange(start, stop, device=w.device) % k])
        codes = out[0][start // 2 : -(-stop // 2)]
        scales = out[1][start // block_size : -(-stop // block_size)]
        run(op, slab, slab, block_size, *own, (codes, scales))
    return out


def _flat(w: Tensor, start: int, stop: int) -> Tensor:
    """Return ``w.reshape(-1)[start:stop]`` without a copy of what lies outside."""
    if w.ndim == 1:
        return w[start:stop]
    row = w.numel() // len(w)
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _flat(w[first], start - first * row, stop - first * row)
    head = _flat(w[first], start - first * row, row)
    tail = _flat(w[last], 0, stop - last * row)
    return torch.cat([head, w[first + 1 : last].reshape(-1), tail])


def _checked(w: Tensor, check: bool, packed: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    if check and not torch.isfinite(absmax).all():
        position = (~torch.isfinite(w.reshape(-1))).nonzero()[0, 0].cpu()
        index = tuple(int(i) for i in torch.unravel_index(position, w.shape))
        raise ValueError(f"w: expected finite values, got {w[index].item()} at index {index}")
    return packed, absmax


define(
    "quantize",
    "(Tensor w, int block_size, bool check) -> (Tensor, Tensor)",
    _fake,
    compute=_quantize,
)
define(
    "quantize_mse",
    "(Tensor w, int block_size, bool signed, Tensor? weights, bool check) -> (Tensor, Tensor)",
    _fake,
    compute=_quantize_mse,
)
define(
    "quantize_out",
    "(Tensor w, int block_size, bool check, Tensor(a!) packed, Tensor(b!) absmax) -> ()",
    nothing,
    compute=_quantize_out,
)
