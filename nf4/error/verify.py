"""Check every operator on a device against its reference: what `nf4 verify` runs.

What has one answer, codes, scales and dequantized values, must have its bits. Products and
gradients are held to float64: how far the roundings that nf4/error/exact.py allows may take them is
derived in nf4/error/roundoff.py, and is the same on every device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from nf4.error import exact
from nf4.error.roundoff import Exact
from nf4.functional import (
    dequantize,
    embedding,
    linear,
    lora_linear,
    quantize,
    to_fragments,
    to_rows,
)
from nf4.ops.checks import SCALES, check_int
from nf4.reference.dequantize import dequantize as dequantize_reference
from nf4.reference.dropout_mask import dropout_mask
from nf4.reference.quantize import quantize as quantize_reference
from nf4.reference.quantize_absmax import quantize_absmax as quantize_absmax_reference
from nf4.reference.quantize_mse import quantize_mse as quantize_mse_reference
from nf4.tensor import DTYPES, NF4Tensor, fits_fragments

_CPU = torch.device("cpu")
_SHAPES = ((256, 512), (96, 130), (7, 33))  # of weights: whole tiles, ragged, odd
_ROWS = (1, 8, 17, 100, 600)  # of x: each way of multiplying
_BLOCKS = (32, 64, 4096)
_REPACKED = ((256, 512), (48, 64), (16, 4096))  # shapes that fit fragments
_ADAPTERS = ((0, 0.0), (8, 0.0), (8, 0.25))  # rank and dropout


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        operator: name of the operator.
        case: sizes, dtype and options.
        against: "bits" or "float64".
        found: elements that differ, or the relative error.
        bound: the most that found may be.
    """

    operator: str
    case: str
    against: str
    found: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the comparison holds; NaN does not."""
        return self.found <= self.bound


def verify(
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> list[Check]:
    """Run every operator on a device and compare it.

    Args:
        device: where to run; references run on the CPU.
        progress: called with (comparisons done, comparisons in all) after each.
        seed: of the random values.

    Returns:
        One row a comparison; see `Check.ok`.

    Raises:
        TypeError: seed is no int.
        ValueError: there is no such device, or none of that kind, or seed is below 0.
    """
    check_int(seed, "seed", 0)
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that is here, got {device}: {first}") from error
    total = comparisons()
    rows: list[Check] = []
    for group in (_bits, _embeddings, _repacked, _products):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for row in group(device):
                rows.append(row)
                if progress is not None:
                    progress(len(rows), total)
    return rows


def comparisons() -> int:
    """Return how many comparisons `verify` makes."""
    dtypes, shapes = len(DTYPES), len(_SHAPES)
    quantized = 2 * (len(SCALES) + 1)  # codes and scales, of each kind of scale and one weighted
    double = 2 * (3 + 2 * dtypes)  # of two kinds: parts of its scales; it and the plain one back
    bits = (shapes + 1) * len(_BLOCKS) * dtypes * (quantized + double)
    repacked = len(_REPACKED) * 2 * (2 + dtypes)
    sides = sum(5 if r else 3 for r, _ in _ADAPTERS)  # output and gradients
    return bits + shapes * 2 + repacked + shapes * len(_ROWS) * dtypes * sides


def _equal(operator: str, case: str, found: Tensor, expected: Tensor) -> Check:
    """Compare bits; signs of zero count."""
    found = found.detach().cpu()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return Check(operator, case, "bits", float(expected.numel()), 0)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[found.element_size()]
    differ = found.contiguous().view(kind) != expected.contiguous().view(kind)
    return Check(operator, case, "bits", float(differ.sum()), 0)


def _bits(device: torch.device) -> Iterator[Check]:
    for shape, block_size, dtype in product((*_SHAPES, (5,)), _BLOCKS, DTYPES):
        w = (torch.randn(shape, device=_CPU) * torch.randn(shape, device=_CPU).exp()).to(dtype)
        columns = torch.randn(shape[-1], device=_CPU).mul(3).exp()
        for scale, weights in (*((s, None) for s in SCALES), ("mse", columns)):
            case = f"{tuple(shape)}, block {block_size}, {_name(dtype)}, scale {scale}"
            if weights is not None:
                case += ", weighted"
            if scale == "absmax":
                packed, absmax = quantize_reference(w, block_size)
            else:
                packed, absmax = quantize_mse_reference(w, block_size, scale == "mse", weights)
            counts = None if weights is None else weights.to(device)
            q = quantize(w.to(device), block_size, False, scale=scale, weights=counts)
            yield _equal("quantize", case, q.packed.view(-1), packed)
            yield _equal("quantize, scales", case, q.absmax, absmax)
            if scale == "mse-positive" or weights is not None:
                continue
            double = quantize(w.to(device), block_size, True, scale=scale)
            expected_parts = quantize_absmax_reference(absmax)
            for part, expected in zip(double.parts()[1:], expected_parts, strict=True):
                assert part is not None
                yield _equal("quantize_absmax", case, part, expected)
            for held, out in product((q, double), DTYPES):
                back = dequantize_reference(held.to(_CPU).as_weight(), out)
                what = f"{case}, to {_name(out)}"
                yield _equal("dequantize", what, dequantize(held, out), back)


def _embeddings(device: torch.device) -> Iterator[Check]:
    for shape, double_quant in product(_SHAPES, (False, True)):
        q = quantize(torch.randn(shape, device=_CPU), 64, double_quant)
        rows = torch.randint(shape[0], (3, 5), device=_CPU)
        found = embedding(rows.to(device), q.to(device))
        yield _equal("embedding", f"{shape}, {double_quant=}", found, dequantize(q)[rows])


def _repacked(device: torch.device) -> Iterator[Check]:
    for shape, double_quant in product(_REPACKED, (False, True)):
        q = quantize(torch.randn(shape, device=_CPU), 64, double_quant)
        f = to_fragments(q.to(device))
        case = f"{shape}, {double_quant=}"
        yield _equal("repack, to fragments", case, f.packed, to_fragments(q).packed)
        yield _equal("repack, to rows", case, to_rows(f).packed, q.packed)
        for dtype in DTYPES:
            what = f"{case}, fragments, {_name(dtype)}"
            yield _equal("dequantize", what, dequantize(f, dtype), dequantize(q, dtype))


def _products(device: torch.device) -> Iterator[Check]:
    for shape, rows, dtype in product(_SHAPES, _ROWS, DTYPES):
        q = quantize(torch.randn(shape, device=_CPU) / shape[1] ** 0.5)
        held = q.to(device)
        if fits_fragments(q.shape, q.block_size) and device.type != "cpu":
            held = to_fragments(held)
        x = torch.randn(rows, shape[1], device=_CPU).to(dtype)
        case = f"{rows} rows, {shape}, {_name(dtype)}"
        for r, p in _ADAPTERS:
            name = "linear" if not r else f"lora_linear, rank {r}, dropout {p}"
            yield from _against_float64(name, case, x, q, held, r, p)


def _against_float64(
    name: str, case: str, x: Tensor, q: NF4Tensor, held: NF4Tensor, r: int, p: float
) -> Iterator[Check]:
    """Compare output and gradients; q on the CPU, held the same weight on the device."""
    (n, k), device, dtype = q.shape, held.device, x.dtype
    bias, dy = torch.randn(n, device=_CPU), torch.randn(len(x), n, device=_CPU).to(dtype)
    a, b = torch.randn(r, k, device=_CPU) / k**0.5, torch.randn(n, r, device=_CPU)
    seed = torch.tensor(7, device=_CPU)
    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, bias, a, b)]
    if r:
        low = (leaves[2], leaves[3], 2.0, leaves[1], p)
        y = lora_linear(leaves[0], held, *low, seed.to(device) if p else None)
    else:
        leaves = leaves[:2]
        y = linear(leaves[0], held, leaves[1])
    found = [y.detach(), *torch.autograd.grad(y, leaves, dy.to(device))]
    keep = dropout_mask(seed, x.shape, p) if p else None
    right = exact.LoraLinear(x, q, a, b, 2.0, bias, dy, keep, p)
    for what, one in zip(("y", "dx", "dbias", "dA", "dB"), found, strict=False):
        expected: Exact = getattr(right, what)
        bound = expected.relative_limit
        yield Check(name, f"{case}, {what}", "float64", bound * expected.share(one), bound)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
