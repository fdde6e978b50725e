"""What transformers has to know of a model whose layers nf4 has quantized, adapted or merged.

A model that holds 4-bit layers carries our ``quantization_config`` and quantizer from the moment
they are there, so that ``save_pretrained`` writes what ``from_pretrained`` opens; a model that
holds none any more carries neither.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from nf4.adapters.layer import adapted_layers
from nf4.integrations.transformers.config import NF4Config
from nf4.integrations.transformers.quantizer import NF4Quantizer, describe
from nf4.integrations.transformers.zero import refuse_zero3
from nf4.layers.module import QuantizedModule
from nf4.models.hosts import HOSTS


class TransformersHost:
    """Keeps config and quantizer of transformers' models true to their layers."""

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if another method has quantized a model, or ZeRO-3 is to take it."""
        for hf in _pretrained(model):
            refuse_zero3("model")
            found = getattr(hf, "hf_quantizer", None)
            if found is not None and not isinstance(found, NF4Quantizer):
                method = getattr(found.quantization_config, "quant_method", type(found).__name__)
                raise ValueError(
                    f"model: expected one that no other method has quantized, got a "
                    f"{type(hf).__name__} with a quantization_config of "
                    f"{getattr(method, 'value', method)!r}"
                )

    def changed(self, model: nn.Module, form: Mapping[str, Any]) -> None:
        """Let config and quantizer say what layers a model has now."""
        for hf in _pretrained(model):
            settle(hf, form)


def _pretrained(model: nn.Module) -> Iterator[Any]:
    """Yield transformers' models within a module that are not inside another one."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not name.startswith(tuple(inside)):
            inside.append(f"{name}." if name else "")
            yield module


def settle(model: Any, form: Mapping[str, Any] | None = None) -> None:
    """Let a transformers model carry our config and quantizer if it holds 4-bit layers, else not.

    Args:
        model: a ``PreTrainedModel``.
        form: how its layers were quantized, by options of `NF4Config`, as far as known.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        if quantizer is None:
            quantizer = NF4Quantizer(NF4Config(**(form or {})))
            conversions = getattr(model, "_weight_conversions", None)
            if conversions is None:
                conversions = get_model_conversion_mapping(model, add_legacy=False)
            quantizer.keep_conversions(model, conversions)
            model.hf_quantizer = quantizer
        if isinstance(quantizer, NF4Quantizer):
            config = quantizer.quantization_config
            _untie(model)
            config.scale = (form or {}).get("scale", config.scale)
            describe(config, model)
            quantizer.adapted = bool(adapted_layers(model))
            model.config.quantization_config = config
    elif isinstance(quantizer, NF4Quantizer):
        _forget(model, quantizer)


def _forget(model: Any, quantizer: NF4Quantizer) -> None:
    """Let a model that holds nothing in 4 bits any more be saved as a dense one, as it computes."""
    for name, value in vars(model).pop("_dense_ties", {}).items():
        setattr(model, name, value)
    if quantizer.dense_conversions is not None:
        model._weight_conversions = quantizer.dense_conversions
    quantizer.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
            vars(module.config).pop("quantization_config", None)
    _untie(model)


def _untie(model: Any) -> None:
    """Let a model not tie weights that an adapter, or four bits for one of them, told apart."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    modules = dict(model.named_modules(remove_duplicate=False))
    apart = [
        target
        for target, source in ties.items()
        if _is_quantized(modules, target) != _is_quantized(modules, source)
        or not (
            _is_quantized(modules, target)
            or model.get_parameter_or_buffer(target) is model.get_parameter_or_buffer(source)
        )
    ]
    if not apart:
        return
    model.all_tied_weights_keys = {t: s for t, s in ties.items() if t not in apart}
    if not model.all_tied_weights_keys:
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False


def _is_quantized(modules: Mapping[str, nn.Module], name: str) -> bool:
    return isinstance(modules.get(name.rpartition(".")[0]), QuantizedModule)


def install() -> None:
    """Let transformers' models be told when their layers change; once."""
    if not any(isinstance(host, TransformersHost) for host in HOSTS):
        HOSTS.append(TransformersHost())
