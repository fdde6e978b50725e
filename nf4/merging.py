"""Fold adapters into the weights of a model, dense or in four bits again."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nf4.convert import (
    check_callback,
    check_forward,
    check_model,
    check_no_peft,
    quantized_layers,
    replace_layers,
)
from nf4.embedding import EmbeddingNF4
from nf4.experts import ExpertsNF4
from nf4.functional import dequantize, quantize
from nf4.linear import LinearNF4, QLoRALinear
from nf4.quantized_module import QuantizedModule
from nf4.tensor import NF4Tensor

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class MergeError:
    """How far a merged weight is from base plus adapter, by `merge`.

    Attributes:
        name: dotted name of the layer.
        relative: Frobenius norm of the difference over that of base plus adapter.
        of_update: the same difference over the norm of what the adapter adds, the drift: at 1 the
            adapter is lost. NaN if it adds nothing.
    """

    name: str
    relative: float
    of_update: float


def merge(
    model: Model,
    requantize: bool = False,
    report: Callable[[MergeError], None] | None = None,
) -> Model:
    """Fold adapters into the weights: dense again by default, or in four bits once more.

    The sum is taken in fp32. Dense, it is rounded once to the layer's dtype: layers become
    ``torch.nn.Linear``, experts and embeddings what they were, and what shared its 4-bit weight
    shares the dense one, unless an adapter tells them apart. Requantized, layers with an adapter
    become `LinearNF4` of the same block size, and much of a small adapter may drown in the new
    rounding: `report` tells.

    Args:
        model: a module with `LinearNF4` or `QLoRALinear` layers; changed in place.
        requantize: keep the weights in four bits.
        report: called with the `MergeError` of each layer.

    Returns:
        The model; a new layer if the model itself is one.

    Raises:
        TypeError: model is no module, or requantize no bool.
        ValueError: the model has no quantized layer, or none with an adapter to requantize.
    """
    check_model(model)
    check_no_peft(model)
    check_callback(report, "report")
    if not isinstance(requantize, bool):
        raise TypeError(f"requantize: expected a bool, got {type(requantize).__name__}")
    layers = quantized_layers(model)
    embeddings = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, EmbeddingNF4)
    }
    if not layers and not embeddings:
        raise ValueError(f"model: expected LinearNF4 layers, found none in {type(model).__name__}")
    if requantize:
        _check_replaceable({n: m for n, m in layers.items() if isinstance(m, QLoRALinear)})
        return _merge_requantized(model, layers, report)
    if report is not None:
        for name, layer in layers.items():
            report(merge_error(name, layer.weight, *_exact_and_dense(layer)))
    experts = {n: m for n, m in model.named_modules() if isinstance(m, ExpertsNF4)}
    inside = tuple(f"{name}." for name in experts)
    layers = {n: m for n, m in layers.items() if not (inside and n.startswith(inside))}
    _check_replaceable({**experts, **embeddings, **layers})
    shared: dict[int, Any] = {}

    def dense_of(module: Any, make: Callable[..., nn.Module]) -> nn.Module:
        """Make a module dense, with the weight that those have that share its 4-bit one."""
        if isinstance(module, QLoRALinear):
            return make()
        dense: Any = make(shared.get(id(module.packed)))
        shared[id(module.packed)] = dense.weight
        return dense  # type: ignore[no-any-return]

    model = replace_layers(model, experts, lambda module: module.to_experts())
    model = replace_layers(model, embeddings, lambda m: dense_of(m, m.to_embedding))
    model = replace_layers(model, layers, lambda m: dense_of(m, m.to_dense))
    _forget_quantization(model)
    return model


def _check_replaceable(layers: dict[str, Any]) -> None:
    """Raise ValueError unless every module can be replaced, and adapters merged, before any is."""
    for name, layer in layers.items():
        check_forward(name, layer)
        parts = layer.modules() if isinstance(layer, ExpertsNF4) else [layer]
        for part in (p for p in parts if isinstance(p, QLoRALinear)):
            if not part.packed.is_meta and not part.merged_weight().isfinite().all():
                raise ValueError(
                    f"{name}: expected base plus adapter that {part.dtype} can hold, got NaN or an "
                    "infinity"
                )


def _forget_quantization(model: Any) -> None:
    """Let a transformers model that holds nothing in 4 bits any more be saved as a dense one."""
    if any(isinstance(m, QuantizedModule) for m in model.modules()):
        return
    for name, value in vars(model).pop("_dense_ties", {}).items():
        setattr(model, name, value)
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if quantizer is not None and method == "nf4":
        quantizer.remove_quantization_config(model)


def _exact_and_dense(layer: LinearNF4) -> tuple[Tensor, Tensor]:
    exact = layer.exact_merged_weight()
    return exact, exact.to(layer.dtype)


def _merge_requantized(
    model: Model, layers: dict[str, LinearNF4], report: Callable[[MergeError], None] | None
) -> Model:
    adapted = {n: m for n, m in layers.items() if isinstance(m, QLoRALinear)}
    if not adapted:
        raise ValueError("model: expected layers with adapters to merge, found none")
    names = {id(layer): name for name, layer in adapted.items()}

    def convert(layer: QLoRALinear) -> LinearNF4:
        q = requantized(names[id(layer)], layer.exact_merged_weight(), layer.weight, report)
        return LinearNF4.from_weight(q, layer.bias).take_after(layer)

    return replace_layers(model, adapted, convert)


def requantized(
    name: str, exact: Tensor, base: NF4Tensor, report: Callable[[MergeError], None] | None
) -> NF4Tensor:
    """Return a merged weight quantized as its base was.

    Args:
        name: of the layer.
        exact: float32, base plus adapters.
        base: the weight without adapters.
        report: called with the `MergeError`.
    """
    q = replace(quantize(exact, base.block_size, base.double_quant), dtype=base.dtype)
    if report is not None:
        report(merge_error(name, base, exact, dequantize(q, torch.float32)))
    return q


def merge_error(name: str, base: NF4Tensor, exact: Tensor, found: Tensor) -> MergeError:
    """Return how far a merged weight is from what it should be.

    Args:
        name: of the layer.
        base: its weight without adapters.
        exact: float32, base plus adapters.
        found: floating, what it became.
    """
    difference = (found.float() - exact).norm()
    update = (exact - dequantize(base, torch.float32)).norm()
    relative = (difference / exact.norm().clamp_min(1e-38)).item()
    return MergeError(name, relative, (difference / update).item() if update > 0 else math.nan)
