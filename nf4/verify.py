"""Check every operator on a device against its reference: what `nf4 verify` runs.

What has one answer, codes, scales and dequantized values, must have its bits. Products and
gradients are held to float64: their relative error may be at most `SLACK` times that of PyTorch's
own products with the dequantized weight in the same dtype, which round the same numbers in another
order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nf4.checks import SCALES
from nf4.functional import (
    dequantize,
    embedding,
    linear,
    lora_linear,
    quantize,
    to_fragments,
    to_rows,
)
from nf4.reference.dequantize import dequantize as dequantize_reference
from nf4.reference.dropout_mask import dropout_mask
from nf4.reference.quantize import quantize as quantize_reference
from nf4.reference.quantize_absmax import quantize_absmax as quantize_absmax_reference
from nf4.reference.quantize_mse import quantize_mse as quantize_mse_reference
from nf4.tensor import DTYPES, NF4Tensor, fits_fragments

SLACK = 1.25
_CPU = torch.device("cpu")
_SHAPES = ((256, 512), (96, 130), (7, 33))  # of weights: whole tiles, ragged, odd
_ROWS = (1, 8, 17, 100, 600)  # of x: each way of multiplying


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
    device: torch.device | str, progress: Callable[[int, int], None] | None = None
) -> list[Check]:
    """Run every operator on a device and compare it.

    Args:
        device: where to run; references run on the CPU.
        progress: called with (groups done, groups in all).

    Returns:
        One row a comparison; see `Check.ok`.

    Raises:
        ValueError: there is no such device, or none of that kind.
    """
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that is here, got {device}: {first}") from error
    groups = (_bits, _embeddings, _repacked, _products)
    rows: list[Check] = []
    for done, group in enumerate(groups, start=1):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            rows += group(device)
        if progress is not None:
            progress(done, len(groups))
    return rows


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
    for shape, block_size, dtype in product((*_SHAPES, (5,)), (32, 64, 4096), DTYPES):
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
                parts = [None if part is None else part.cpu() for part in held.parts()]
                back = _dequantized(parts, shape, block_size, out)
                what = f"{case}, to {_name(out)}"
                yield _equal("dequantize", what, dequantize(held, out), back)


def _dequantized(parts: list[Any], shape: Any, block_size: int, dtype: torch.dtype) -> Tensor:
    packed, absmax, absmax2, offset = parts
    return dequantize_reference(packed, absmax, absmax2, offset, shape, block_size, dtype)


def _embeddings(device: torch.device) -> Iterator[Check]:
    for shape, double_quant in product(_SHAPES, (False, True)):
        q = quantize(torch.randn(shape, device=_CPU), 64, double_quant)
        rows = torch.randint(shape[0], (3, 5), device=_CPU)
        found = embedding(rows.to(device), q.to(device))
        yield _equal("embedding", f"{shape}, {double_quant=}", found, dequantize(q)[rows])


def _repacked(device: torch.device) -> Iterator[Check]:
    for shape, double_quant in product(((256, 512), (48, 64), (16, 4096)), (False, True)):
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
        for r, p in ((0, 0.0), (8, 0.0), (8, 0.25)):
            name = "linear" if not r else f"lora_linear, rank {r}, dropout {p}"
            yield from _against_float64(name, case, x, q, held, r, p)


def _against_float64(
    name: str, case: str, x: Tensor, q: NF4Tensor, held: NF4Tensor, r: int, p: float
) -> Iterator[Check]:
    """Compare output and gradients; q on the CPU, held the same weight on the device."""
    (n, k), device, dtype = q.shape, held.device, x.dtype
    bias, dy = torch.randn(n, device=_CPU), torch.randn(len(x), n, device=_CPU).to(dtype)
    a, b = torch.randn(r, k, device=_CPU) / k**0.5, torch.randn(n, r, device=_CPU)
    # What is multiplied is the same for all: rounded to the dtype of x already
    bias, a, b = (t.to(dtype).float() for t in (bias, a, b))
    seed = torch.tensor(7, device=_CPU)
    keep = dropout_mask(seed, x.shape, p) if p else None

    def plain(kind: torch.dtype, where: torch.device) -> list[Tensor]:
        """Multiply by the dense weight, as PyTorch does."""
        parts = [t.to(where, kind).requires_grad_() for t in (x, bias, a, b)]
        inputs, bias_, a_, b_ = parts
        # The weight is not rounded for float64: that is the product that is meant
        w = dequantize(q, torch.float64 if kind == torch.float64 else dtype).to(where, kind)
        y = torch.nn.functional.linear(inputs, w, bias_)
        if r:
            dropped = inputs if keep is None else inputs * keep.to(where) / (1 - p)
            y = y + 2.0 * (dropped @ a_.T @ b_.T)
        return _with_gradients(y, dy.to(where, kind), parts if r else parts[:2])

    parts = [x.to(device), *(t.to(device) for t in (bias, a, b))]
    parts = [t.detach().requires_grad_() for t in parts]
    if r:
        low = (parts[2], parts[3], 2.0, parts[1], p)
        y = lora_linear(parts[0], held, *low, seed.to(device) if p else None)
    else:
        y = linear(parts[0], held, parts[1])
    ours = _with_gradients(y, dy.to(device), parts if r else parts[:2])
    exact, unfused = plain(torch.float64, _CPU), plain(dtype, device)
    names = ("y", "dx", "dbias", "dA", "dB")
    for what, found, right, other in zip(names, ours, exact, unfused, strict=False):
        bound = SLACK * _error(other, right) + 2 * torch.finfo(dtype).eps / 8
        yield Check(name, f"{case}, {what}", "float64", _error(found, right), bound)


def _with_gradients(y: Tensor, dy: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def _error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().cpu().double(), exact.cpu()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-300))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
