"""Fold adapters into the weights of a model, dense or in four bits again."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nf4.adapters.factors import OutputFactor
from nf4.adapters.layer import AdaptedLayer
from nf4.adapters.term import base_of
from nf4.functional import dequantize, quantize, scales_of, to_rows
from nf4.layers.embedding import EmbeddingNF4
from nf4.layers.experts import ExpertsNF4
from nf4.layers.linear import LinearNF4
from nf4.layers.module import QuantizedModule
from nf4.models.hosts import tell_hosts
from nf4.models.quantize import (
    check_callback,
    check_forward,
    check_model,
    check_no_peft,
    replace_layers,
)
from nf4.tensor import NF4Tensor
from nf4.tools.ranks import reshard

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
    requantize: bool | str = False,
    report: Callable[[MergeError], None] | None = None,
) -> Model:
    """Fold adapters into the weights: dense again by default, or in four bits.

    The sum is taken in fp32. Dense, it is rounded once to the layer's dtype: layers become
    ``torch.nn.Linear``, experts and embeddings what they were, and what shared its 4-bit weight
    shares the dense one, unless an adapter tells them apart. Requantized, layers with an adapter
    become `LinearNF4` of the same block size, and much of a small adapter may drown in the new
    rounding: `report` tells.

    Args:
        model: a module with `LinearNF4` layers or with adapters; changed in place.
        requantize: True to keep 4-bit weights in four bits. "exact" to do so where nothing is
            rounded to a code: layers without adapter stay, and factors of outputs, (IA)³'s, go into
            the scales, which are fp32 then, 4.5 instead of 4.127 bits per weight at block size 64;
            other layers with an adapter become dense.
        report: called with the `MergeError` of each layer that is merged.

    Returns:
        The model; a new layer if the model itself is one.

    Raises:
        TypeError: model is no module, or requantize neither a bool nor "exact".
        ValueError: the model has no quantized layer and no adapter, or none to keep in four bits.
    """
    check_model(model)
    check_no_peft(model)
    check_callback(report, "report")
    if not isinstance(requantize, bool) and requantize != "exact":
        raise TypeError(f"requantize: expected a bool or 'exact', got {requantize!r}")
    reshard(model)
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            module.check_whole("merge")
    layers = _mergeable(model)
    if not layers and not any(isinstance(m, EmbeddingNF4 | ExpertsNF4) for m in model.modules()):
        raise ValueError(
            f"model: expected LinearNF4 layers or adapters, found none in {type(model).__name__}"
        )
    if requantize:
        return _merge_in_4_bits(model, layers, requantize == "exact", report)
    if report is not None:
        for name, layer in layers.items():
            report(_dense_error(name, layer))
    return make_dense(model)


def make_dense(model: Model) -> Model:
    """Replace every layer in four bits, and every one with adapters, by what `merge` says.

    Args:
        model: any module; changed in place, and only after every layer has been checked.

    Returns:
        The model; a new layer if the model itself is one.

    Raises:
        ValueError: a layer cannot be replaced, or is not finite with its adapters.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    experts = {n: m for n, m in model.named_modules() if isinstance(m, ExpertsNF4)}
    embeddings = {n: m for n, m in modules.items() if isinstance(m, EmbeddingNF4)}
    inside = tuple(f"{name}." for name in experts)
    layers = {n: m for n, m in _mergeable(model).items() if not n.startswith(inside)}
    _check_replaceable({**experts, **embeddings, **layers})
    shared: dict[int, Any] = {}

    def dense_of(module: Any, make: Callable[..., nn.Module]) -> nn.Module:
        """Make a module dense, with the weight that those have that share its 4-bit one."""
        if isinstance(module, AdaptedLayer):
            return make()
        dense: Any = make(shared.get(id(module.packed)))
        shared[id(module.packed)] = dense.weight
        return dense  # type: ignore[no-any-return]

    del modules
    model = replace_layers(model, experts, lambda module: module.to_experts())
    model = replace_layers(model, embeddings, lambda m: dense_of(m, m.to_embedding))
    model = replace_layers(model, layers, lambda m: dense_of(m, m.to_dense))
    tell_hosts(model)
    return model


def _mergeable(model: nn.Module) -> dict[str, Any]:
    """Return the layers in four bits and those with adapters, by name."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LinearNF4 | AdaptedLayer)
    }


def _check_replaceable(layers: dict[str, Any]) -> None:
    """Raise ValueError unless every module can be replaced, and adapters merged, before any is."""
    for name, layer in layers.items():
        check_forward(name, layer)
        parts = layer.modules() if isinstance(layer, ExpertsNF4) else [layer]
        for part in (p for p in parts if isinstance(p, AdaptedLayer)):
            if any(parameter.is_meta for parameter in part.parameters()):
                continue
            weight, bias = part.exact_merged()
            if isinstance(layer, ExpertsNF4) and bias is not None:
                raise ValueError(f"{name}: expected adapters without a bias on experts, got one")
            found = [weight] if bias is None else [weight, bias]
            if not all(tensor.to(part.dtype).isfinite().all() for tensor in found):
                raise ValueError(
                    f"{name}: expected base plus adapter that {part.dtype} can hold, got NaN or an "
                    "infinity"
                )


def _dense_error(name: str, layer: Any) -> MergeError:
    exact = layer.exact_merged_weight()
    base = layer.base() if isinstance(layer, AdaptedLayer) else base_of(layer.weight)
    return merge_error(name, base.dense(), exact, exact.to(layer.dtype))


def _merge_in_4_bits(
    model: Model,
    layers: dict[str, Any],
    exact: bool,
    report: Callable[[MergeError], None] | None,
) -> Model:
    """Merge adapters on 4-bit weights into such weights; if wanted, only where that is exact."""
    adapted = {n: m for n, m in layers.items() if isinstance(m, AdaptedLayer)}
    if not any(isinstance(m, LinearNF4) for m in adapted.values()):
        raise ValueError("model: expected 4-bit layers with adapters to merge, found none")
    _check_replaceable(adapted)
    layers.clear()  # the caller's: layers are freed one by one
    names = {id(layer): name for name, layer in adapted.items()}

    def convert(layer: Any) -> nn.Module:
        name, dense = names[id(layer)], not isinstance(layer, LinearNF4)
        q = None if dense else scaled_weight(layer)
        if dense or (exact and q is None):
            if report is not None:
                report(_dense_error(name, layer))
            merged: nn.Module = layer.to_dense()
            return merged
        weight, bias = layer.exact_merged()
        if q is None:
            q = requantized(name, weight, layer.weight, report)
        elif report is not None:
            base = layer.base().dense()
            report(merge_error(name, base, weight, dequantize(q, torch.float32)))
        return LinearNF4.from_weight(q, bias).take_after(layer)

    model = replace_layers(model, adapted, convert)
    tell_hosts(model)
    return model


def scaled_weight(layer: Any) -> NF4Tensor | None:
    """Return a layer's 4-bit weight with factors of its outputs in its scales.

    Args:
        layer: a `LinearNF4` with adapters.

    Returns:
        With scales in fp32; no code changes. The weight itself if there is no factor. None where
        an active adapter does more than to scale outputs, or blocks straddle rows.
    """
    factors = [layer.named_adapters()[name].merged_term() for name in layer.active_adapters]
    if not factors:
        held: NF4Tensor = layer.weight
        return held
    q = to_rows(layer.weight)
    if not all(isinstance(f, OutputFactor) for f in factors) or q.shape[1] % q.block_size:
        return None
    scales = scales_of(q).view(q.shape[0], -1)
    for factor in factors:
        scales = scales * factor.factor.detach().float()[:, None]
    return replace(q, absmax=scales.reshape(-1), absmax2=None, offset=None)


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
        dense = dequantize(base, torch.float32)
        report(merge_error(name, dense, exact, dequantize(q, torch.float32)))
    return q


def merge_error(name: str, base: Tensor, exact: Tensor, found: Tensor) -> MergeError:
    """Return how far a merged weight is from what it should be.

    Args:
        name: of the layer.
        base: float32, its weight without adapters.
        exact: float32, base plus adapters.
        found: floating, what it became.
    """
    difference = (found.float() - exact).norm()
    update = (exact - base).norm()
    relative = (difference / exact.norm().clamp_min(1e-38)).item()
    return MergeError(name, relative, (difference / update).item() if update > 0 else math.nan)
