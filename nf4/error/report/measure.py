"""Measure a model for its report, a weight at a time. It computes; the other files here show."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nf4.codebook import BLOCK_SIZES
from nf4.error.activations import collect_activation_stats
from nf4.error.measured import LayerError, layer_error, perplexity
from nf4.error.schemes import Scheme, compared
from nf4.files.dense import dense_weights_in
from nf4.models.selection import dense_layers, dense_weights, resolve_skip
from nf4.ops.checks import check_block_size, check_scale
from nf4.reference._blocks import as_blocks
from nf4.tools.progress import Progress, steps

SAMPLE = 1 << 16  # weights of a layer on which schemes are compared: 16 stretches of 4096
BINS = 128  # of x / absmax from -1 to 1
WORST = 10


@dataclass(frozen=True)
class SchemeError:
    """The error of a scheme over a model.

    Attributes:
        scheme: which.
        label: what a reader calls it.
        bits_per_weight: scales included.
        relative: norm of the error over norm of the weights, over all layers, from samples of them.
        expected: the same for weights from N(0, 1), by theory; None where there is none.
    """

    scheme: Scheme
    label: str
    bits_per_weight: float
    relative: float
    expected: float | None


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model under a scheme, by its label; fp32 is the model as it is."""

    label: str
    bits_per_weight: float
    perplexity: float


@dataclass
class ErrorReport:
    """What was measured of a model.

    Attributes:
        model: as it was asked for.
        scheme: what the layers were quantized by.
        layers: one row a layer, in the order of the files.
        relative: norm of the error over norm of the weights, over all layers.
        expected: the same by theory, for normal layers.
        parameters: weights in all these layers.
        bytes_before: of the weights in 16 bits.
        bytes_after: of the quantized weights, scales included.
        histogram: share of weights in each of `BINS` bins of x / absmax from -1 to 1.
        schemes: other schemes, compared on a sample of every layer.
        tokens: that perplexity was measured on.
        perplexities: of the model, under each scheme; empty if not asked for.
    """

    model: str
    scheme: Scheme
    layers: list[LayerError] = field(default_factory=list)
    relative: float = 0.0
    expected: float = 0.0
    parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    histogram: list[float] = field(default_factory=list)
    schemes: list[SchemeError] = field(default_factory=list)
    tokens: int = 0
    perplexities: list[Perplexity] = field(default_factory=list)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio over all layers, in dB."""
        return -20 * math.log10(self.relative) if self.relative else math.inf

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over all layers, scales included."""
        return 8 * self.bytes_after / max(self.parameters, 1)

    def worst(self) -> list[LayerError]:
        """Return the ten layers of largest relative error, the worst first."""
        return sorted(self.layers, key=lambda row: -row.error.relative)[:WORST]


def measure(
    source: str | Path,
    skip_modules: str | Iterable[str],
    scheme: Scheme,
    progress: Progress,
    compare: bool = True,
) -> ErrorReport:
    """Measure the error of every layer of a model in its files.

    Args:
        source: see `nf4.files.dense.dense_weights_in`.
        skip_modules: names of modules to leave out.
        scheme: how to quantize; its codebook is "nf4".
        progress: makes progress bars.
        compare: measure other schemes too, on a sample of every layer.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `nf4.model_error`.
    """
    check_block_size(scheme.block_size)
    check_scale(scheme.scale)
    weights = dense_weights_in(source, skip_modules)
    report = ErrorReport(str(source), scheme)
    histogram = torch.zeros(BINS, dtype=torch.float64)
    compared_to = compared() if compare else []
    theories = []
    if compare:
        with steps(progress, "Compute codebooks", len(compared_to)) as step:
            for other in compared_to:
                theories.append(other.expected())
                step()
    noise = [0.0] * len(compared_to)
    power = 0.0
    with progress("Measure layers", len(weights)) as bar:
        for weight in weights:
            w = weight.read()
            row = layer_error(weight, w, scheme.block_size, scheme.double_quant, scheme.scale)
            report.layers.append(row)
            histogram += _histogram(w, scheme.block_size)
            if compare:
                sample = _sample(w)
                share = w.numel() / sample.numel()
                power += share * sample.double().square().sum().item()
                for i, other in enumerate(compared_to):
                    difference = other.round(sample) - sample
                    noise[i] += share * difference.square().sum().item()
            bar.step(weight.name)
    _totals(report)
    report.histogram = (histogram / histogram.sum().clamp_min(1)).tolist()
    for other, lost, theory in zip(compared_to, noise, theories, strict=True):
        report.schemes.append(
            SchemeError(
                other,
                other.label,
                other.bits_per_weight,
                math.sqrt(lost / power) if power else 0.0,
                None if theory is None else theory.relative,
            )
        )
    return report


def _totals(report: ErrorReport) -> None:
    errors = [row.error for row in report.layers]
    noise = sum(e.mse * e.numel for e in errors)
    expected = sum(e.expected.mse * e.numel for e in errors)
    power = sum(e.rms**2 * e.numel for e in errors)
    if power:
        report.relative, report.expected = math.sqrt(noise / power), math.sqrt(expected / power)
    report.parameters = sum(e.numel for e in errors)
    report.bytes_before = 2 * report.parameters
    report.bytes_after = round(
        sum(row.bits_per_weight * row.error.numel for row in report.layers) / 8
    )


def _sample(w: Tensor) -> Tensor:
    """Return whole blocks from all over a weight, float32, flat; all of it if it is small."""
    flat, longest = w.detach().reshape(-1), BLOCK_SIZES[-1]
    stretches = SAMPLE // longest
    if flat.numel() <= SAMPLE:
        return flat.float()
    rows = flat[: flat.numel() // longest * longest].view(-1, longest)
    chosen = torch.linspace(0, len(rows) - 1, stretches).long()
    return rows[chosen].float().view(-1)


def _histogram(w: Tensor, block_size: int) -> Tensor:
    """Count x / absmax in `BINS` bins; the largest of each block is in the first or the last."""
    blocks = as_blocks(w.detach().float(), block_size)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    scaled = torch.where(largest > 0, blocks / largest, 0.0)
    bins = ((scaled + 1) * (BINS / 2)).int().clamp_(0, BINS - 1)
    return torch.bincount(bins.view(-1)[: w.numel()], minlength=BINS).double()


def perplexities(
    report: ErrorReport,
    model: Any,
    windows: Tensor,
    calibration: Tensor | None,
    schemes: Sequence[Scheme],
    skip_modules: str | Iterable[str],
    progress: Progress,
) -> None:
    """Add the perplexity of a causal language model under each scheme to a report.

    Args:
        report: where to.
        model: in fp32; its weights are changed, and put back.
        windows: int64 ``[windows, T]``, to be scored.
        calibration: int64 ``[windows, T]`` of other text, for scales weighted by activations; None
            leaves these out.
        schemes: which.
        skip_modules: names of modules that stay as they are.
        progress: makes progress bars.
    """
    held = {
        name if part == "weight" else f"{name}.{part}": weight.detach()
        for name, layer in dense_layers(model, resolve_skip(skip_modules)).items()
        for part, weight in dense_weights(layer)
    }
    stats: dict[str, Tensor] = {}
    if calibration is not None:
        with steps(progress, "Collect activations", len(calibration)) as step:
            batches = (window[None] for window in calibration)
            stats = collect_activation_stats(model, batches, skip_modules, lambda _: step())

    originals = {name: weight.clone() for name, weight in held.items()}

    def put(of: Callable[[str, Tensor], Tensor]) -> None:
        """Let the model have what becomes of each original weight, by its name."""
        for name, weight in held.items():
            weight.copy_(of(name, originals[name]))

    def score(label: str, bits: float) -> None:
        with steps(progress, f"Perplexity, {label}", len(windows)) as step:
            found = perplexity(model, windows, lambda *_: step())
        report.perplexities.append(Perplexity(label, bits, found))

    report.tokens = windows.numel()
    score("fp32", 32.0)
    try:
        for scheme in schemes:
            put(lambda _, w, scheme=scheme: scheme.round(w))  # type: ignore[misc]
            score(scheme.label, scheme.bits_per_weight)
        if stats:
            weighted = Scheme(double_quant=True, scale="mse")
            put(lambda name, w: weighted.round(w, stats.get(name)))
            score(f"{weighted.label}, weighted by activations", weighted.bits_per_weight)
    finally:
        put(lambda _, w: w)


def as_json(report: ErrorReport) -> dict[str, Any]:
    """Return a report as what JSON can hold: infinities and NaN become None."""
    rows = []
    for row in report.layers:
        rows.append({**asdict(row), "expected": asdict(row.error.expected)})
    found = {**asdict(report), "sqnr_db": report.sqnr_db, "layers": rows}
    found["worst"] = [row.name for row in report.worst()]
    cleaned: dict[str, Any] = _finite(found)
    return cleaned


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
