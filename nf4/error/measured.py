"""What quantization costs: the error of one tensor, of every layer of a model, and perplexity."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nf4.error.activations import evaluating
from nf4.files.dense import DenseWeight, dense_weights_in
from nf4.functional import dequantize, quantize
from nf4.models.quantize import check_callback, check_layer, check_model
from nf4.models.selection import DEFAULT_SKIP, dense_weights, select_layers
from nf4.ops.checks import check_weight
from nf4.tensor import NF4Tensor, check_nf4

OUTLIER = 4.0  # times rms


@dataclass(frozen=True)
class QuantizationError:
    """The difference between a tensor and its quantization.

    Attributes:
        mse: mean squared error.
        rmse: its square root, in the unit of the weights.
        mae: mean absolute error, in the unit of the weights.
        max_abs: largest absolute error, in the unit of the weights.
        relative: norm of the error over norm of the tensor; 0 for a tensor of zeros.
        sqnr_db: signal to quantization noise ratio in dB, ``-20 log10(relative)``.
        rms: root of the mean square of the tensor, in the unit of the weights.
        kurtosis: excess kurtosis of the tensor about 0: 0 for a normal distribution, more for
            heavier tails; NaN for a tensor of zeros.
        outlier_share: share of elements beyond 4 times rms: 0.000063 for a normal distribution.
        numel: elements.
        block_size: elements that share one scale.
        double_quant: whether the scales are quantized too.
    """

    mse: float
    rmse: float
    mae: float
    max_abs: float
    relative: float
    sqnr_db: float
    rms: float
    kurtosis: float
    outlier_share: float
    numel: int
    block_size: int
    double_quant: bool

    @property
    def expected(self) -> "QuantizationError":
        """The error that theory expects of normal weights of the same size and `rms`.

        A measured error well above it, with a `kurtosis` far from 0, says that the tensor is not
        normal: it has outliers, or parts of different spread.
        """
        from nf4.error.theory import expected_error  # scipy takes its time to import

        e = expected_error(self.block_size, self.double_quant, numel=max(self.numel, 1))
        unit = self.rms
        zero = unit == 0
        return replace(
            self,
            mse=e.mse * unit**2,
            rmse=e.rmse * unit,
            mae=e.mae * unit,
            max_abs=e.max_abs * unit,
            relative=0.0 if zero else e.relative,
            sqnr_db=math.inf if zero else e.sqnr_db,
            kurtosis=math.nan if zero else 0.0,
            outlier_share=0.0 if zero else math.erfc(OUTLIER / math.sqrt(2)),
        )


def quantization_error(w: Tensor, q: NF4Tensor) -> QuantizationError:
    """Measure how far q is from w. The dequantized tensor is taken in fp32, unrounded.

    Args:
        w: float32, float16 or bfloat16, any shape.
        q: a quantized tensor of the same shape.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the shapes or devices differ, or w holds NaN or an infinity.
    """
    check_weight(w, "w")
    check_nf4(q)
    if w.shape != q.shape:
        raise ValueError(f"w: expected shape {tuple(q.shape)} like q, got {tuple(w.shape)}")
    if w.device != q.device:
        raise ValueError(f"w: expected device {q.device} like q, got {w.device}")
    form = (w.numel(), q.block_size, q.double_quant)
    if w.numel() == 0:
        return QuantizationError(0.0, 0.0, 0.0, 0.0, 0.0, math.inf, 0.0, math.nan, 0.0, *form)
    wide = w.detach().float()
    largest = wide.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError("w: expected finite values, got NaN or an infinity")
    # Taken to a largest value near 1 by a power of two, exactly: squares stay in the range of fp32.
    unit = 2.0 ** min(max(math.frexp(largest)[1], -126), 126)
    diff = dequantize(q, torch.float32).sub_(wide).abs_().mul_(1 / unit)
    mae, max_abs = _mean(diff) * unit, diff.max().item() * unit
    noise = _mean(diff.square_())
    squares = (wide * (1 / unit)).square_()
    power = _mean(squares)
    outliers = (squares > OUTLIER**2 * power).sum().item() / w.numel()
    fourth = _mean(squares.square_())
    relative = math.sqrt(noise / power) if power else 0.0
    sqnr_db = -20 * math.log10(relative) if relative else math.inf
    kurtosis = fourth / power**2 - 3 if power else math.nan
    rmse, rms = math.sqrt(noise) * unit, math.sqrt(power) * unit
    found = (rmse**2, rmse, mae, max_abs, relative, sqnr_db, rms, kurtosis, outliers)
    return QuantizationError(*found, *form)


def _mean(x: Tensor) -> float:
    """Return the mean of values that are not negative: of sums of 1024 in fp32.

    A mean in float64 at once converts value by value, at a tenth of the speed.
    """
    flat = x.reshape(-1)
    whole = flat.numel() // 1024 * 1024
    parts = (flat[:whole].view(-1, 1024).sum(dim=1), flat[whole:])
    return sum(part.double().sum().item() for part in parts) / flat.numel()


@dataclass(frozen=True)
class LayerError:
    """The error of one layer of a model.

    Attributes:
        name: dotted name of the layer.
        kind: last part of the name, such as ``"q_proj"``.
        shape: ``(out_features, in_features)``, with the number of experts before it if any.
        bits_per_weight: scales included.
        error: the measured error.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bits_per_weight: float
    error: QuantizationError


def model_error(
    model: nn.Module | str | Path,
    skip_modules: str | Iterable[str] = DEFAULT_SKIP,
    block_size: int = 64,
    double_quant: bool = True,
    scale: str = "absmax",
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerError]:
    """Measure what `nf4.quantize_model` would cost, one row a layer; the model is left unchanged.

    Args:
        model: a module with dense linear layers; or files, read one weight at a time: a
            transformers folder, a folder of safetensors or ``.bin`` files, one such file, or a
            ``.gguf`` file, see `nf4.files.dense.dense_weights_in`.
        skip_modules: names of modules to leave out, as for `nf4.quantize_model`.
        block_size: elements that share one scale.
        double_quant: quantize the scales to 8 bits too.
        scale: how scales are found, see `nf4.quantize`.
        progress: called with (layers done, layers in all).

    Raises:
        TypeError: model is no module or path, or a weight has an unsupported dtype.
        FileNotFoundError: there is nothing at the path, or no file of weights.
        ValueError: the model has no dense linear layer, block_size is not supported, a file is no
            whole file of weights, or a weight is on meta or holds NaN or an infinity; the message
            names the layer.
    """
    check_callback(progress, "progress")
    weights = dense_weights_of(model, skip_modules)
    rows = []
    for done, weight in enumerate(weights, start=1):
        rows.append(layer_error(weight, weight.read(), block_size, double_quant, scale))
        if progress is not None:
            progress(done, len(weights))
    return rows


def dense_weights_of(
    model: nn.Module | str | Path, skip_modules: str | Iterable[str] = DEFAULT_SKIP
) -> list[DenseWeight]:
    """Return the weights that `nf4.quantize_model` would quantize, of a model or its files.

    Raises:
        TypeError: model is no module or path, or a weight has an unsupported dtype.
        ValueError: there are none, or one is on meta or holds NaN or an infinity.
    """
    if isinstance(model, str | Path):
        return dense_weights_in(model, skip_modules)
    check_model(model)
    layers, _ = select_layers(model, skip_modules, stacklevel=5)
    found = []
    for name, layer in layers.items():
        check_layer(name, layer)
        for part, w in dense_weights(layer):
            if w.is_meta:
                raise ValueError(f"{name}.{part}: expected values to measure, got a meta tensor")
            row = name if part == "weight" else f"{name}.{part}"
            found.append(DenseWeight(row, tuple(w.shape), partial(Tensor.detach, w)))
    return found


def layer_error(
    weight: DenseWeight, w: Tensor, block_size: int, double_quant: bool, scale: str
) -> LayerError:
    """Return the error of one weight, as `model_error` does.

    Args:
        weight: which.
        w: what `DenseWeight.read` read.
        block_size: elements that share one scale.
        double_quant: quantize the scales to 8 bits too.
        scale: how scales are found.

    Raises:
        TypeError: w is of an unsupported dtype; the message names the layer.
        ValueError: w holds NaN or an infinity; the same.
    """
    try:
        q = quantize(w, block_size, double_quant, scale=scale, check=True)
    except (TypeError, ValueError) as wrong:
        raise type(wrong)(f"{weight.name}: {wrong}") from wrong
    kind, error = weight.name.rpartition(".")[2], quantization_error(w, q)
    return LayerError(weight.name, kind, weight.shape, q.bits_per_weight, error)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Return the perplexity of a causal language model on windows of tokens.

    Each window is scored on its own; its first token is context only.

    Args:
        model: a module that returns an object with ``logits`` ``[1, T, vocabulary]``.
        windows: int64 ``[windows, T]``, T at least 2.
        progress: called with (windows done, windows in all) after each window.

    Raises:
        ValueError: windows has another shape.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
        raise ValueError(
            f"windows: expected shape (windows, T) with T ≥ 2, got {tuple(windows.shape)}"
        )
    total = 0.0
    with evaluating(model):
        for done, window in enumerate(windows, start=1):
            logits = model(window[None]).logits[0, :-1].float()
            total += nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            if progress is not None:
                progress(done, len(windows))
    return math.exp(total / (windows.numel() - len(windows)))
