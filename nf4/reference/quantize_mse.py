"""Quantize to NF4 with the scale of each block that costs least squared error, in the same format.

For codes q(x / s) the best scale is s = sum(x l) / sum(l^2), l their levels, and the squared error
is sum(x^2) - sum(x l)^2 / sum(l^2) with it: the codes to take are those of the largest
sum(x l)^2 / sum(l^2). They are looked for among those of s = c absmax for each candidate c, with
both signs of s if it may have one, for the levels are not symmetric; the best is refined by taking
the codes of its own best scale, as often as that helps, at most `REFINEMENTS` times.

The sums are of integers, so that every device finds the same scale: x / absmax in units of 2^-13,
levels in units of 2^-10. The last codes are those of `quantize` with the scale found.

With weights h the error is sum(h (x - s l)^2), and h goes into every sum: h over the largest in the
block, in units of 2^-15, at least one unit, so that the sums stay below 2^53.
Source: a signed scale is from BOF4-S (https://arxiv.org/abs/2505.06653, section 4).
"""

import torch
from torch import Tensor

from nf4.codebook import LARGEST_ABSMAX, SMALLEST_ABSMAX, nf4_thresholds
from nf4.reference._blocks import as_blocks
from nf4.reference.quantize import codes_of, pack
from nf4.tools.scale_search import (
    CANDIDATES,
    IMPORTANCE_UNIT,
    LEVEL_STEPS,
    LEVEL_UNIT,
    LEVELS,
    REFINEMENTS,
    X_UNIT,
)

_CHUNK = 1 << 20  # elements at a time


def quantize_mse(
    w: Tensor,
    block_size: int,
    signed: bool,
    weights: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize w.

    Args:
        w: float32, float16 or bfloat16, any shape.
        block_size: elements that share one scale.
        signed: whether a scale may be negative.
        weights: float32 ``[w.shape[-1]]``, finite, none below 0: what the squared error of an
            element in each column counts; all the same by default.
        out: where to write the results; new by default.

    Returns:
        packed: uint8 ``[ceil(n / 2)]`` for n elements.
        absmax: float32 ``[ceil(n / block_size)]``, the scales; not finite where a block is not.
    """
    blocks = as_blocks(w.float(), block_size)
    step = max(_CHUNK // block_size, 1)
    h = blocks[:, :0]
    if weights is not None:
        h = as_blocks(weights.expand(w.shape), block_size)
    parts = [
        _of_blocks(blocks[i : i + step], _importance(h[i : i + step]), signed)
        for i in range(0, len(blocks), step)
    ]
    codes = torch.cat([part[0].view(-1) for part in parts]) if parts else blocks.new_empty(0).byte()
    absmax = torch.cat([part[1] for part in parts]) if parts else blocks.new_empty(0)
    packed = pack(codes[: w.numel() + w.numel() % 2])
    return (packed, absmax) if out is None else (out[0].copy_(packed), out[1].copy_(absmax))


def _importance(h: Tensor) -> Tensor:
    """Return what each element counts, int64 ``[blocks, block_size]``; ``[blocks, 1]`` if alike."""
    if not h.shape[1]:
        return torch.ones(len(h), 1, dtype=torch.int64, device=h.device)
    largest = h.amax(dim=1, keepdim=True)
    inverse = torch.where(largest < SMALLEST_ABSMAX, 0.0, 1 / largest)
    return (h * inverse / IMPORTANCE_UNIT).round().long().clamp_min(1)


def _of_blocks(x: Tensor, u: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the codes ``[blocks, block_size]`` and scales ``[blocks]`` of whole blocks."""
    absmax = x.abs().amax(dim=1)
    absmax = torch.where(absmax < SMALLEST_ABSMAX, 0.0, absmax)
    scaled = x * torch.where(absmax == 0, 0.0, 1 / absmax)[:, None]
    usable = absmax.isfinite() & (absmax != 0)
    v = torch.where(usable[:, None], scaled / X_UNIT, 0.0).round().int()
    best = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    ratio = torch.ones_like(best)  # of the scale to absmax
    for sign in (1, -1) if signed else (1,):
        for candidate in CANDIDATES:
            best, ratio = _better(v, u, torch.full_like(ratio, sign * candidate), best, ratio)
    for _ in range(REFINEMENTS):
        best, ratio = _better(v, u, ratio, best, ratio)
    found = (absmax.double() * ratio).clamp(-LARGEST_ABSMAX, LARGEST_ABSMAX).float()
    scale = torch.where(usable, found, absmax)
    return codes_of(x, scale[:, None]), scale


def _better(
    v: Tensor, u: Tensor, tried: Tensor, best: Tensor, ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the larger of best and what the codes of a ratio give, and the best ratio for it."""
    size, sign = tried.abs() / X_UNIT, tried.sign().int()[:, None]
    level = torch.full_like(v, LEVELS[0])
    for threshold, step in zip(nf4_thresholds(), LEVEL_STEPS, strict=True):
        level += step * (v * sign > (threshold * size).floor().int()[:, None])
    a = (u * v * sign * level).sum(dim=1).double()
    b = (u * level * level).sum(dim=1).clamp_min(1).double()
    found = a * a / b
    improves = (found > best) & (a > 0)
    new = tried.sign() * (a / b) * (X_UNIT / LEVEL_UNIT)
    return torch.where(improves, found, best), torch.where(improves, new, ratio)
