"""``resize_token_embeddings`` of models whose embeddings or output layer are in four bits.

transformers resizes dense layers: they are dense while it does, and in four bits again afterwards,
where every old row has the bytes that it had.
"""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from nf4.adapters.layer import AdaptedLayer
from nf4.integrations.wrapping import wrap_once
from nf4.layers.embedding import EmbeddingNF4
from nf4.layers.linear import LinearNF4
from nf4.layers.module import QuantizedModule, name_weights
from nf4.layers.resizing import resized
from nf4.models.hosts import tell_hosts
from nf4.models.quantize import check_forward, put_layer, quantized_layer, take_hooks
from nf4.tensor import NF4Tensor


def install() -> None:
    """Let every transformers model resize layers in four bits; once."""
    wrap_once(PreTrainedModel, "resize_token_embeddings", _resizing)


def _resizing(shipped: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' method, and layers in four bits around it."""
    signature = inspect.signature(shipped)

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        asked = [given.get("new_num_tokens"), given.get("pad_to_multiple_of")]
        layers = {} if asked == [None, None] else _vocabulary_layers(self)
        if not layers:
            return shipped(self, *args, **kwargs)
        ties = {name: getattr(self, name) for name in _TIES}
        try:
            for name, known in ties.items():
                setattr(self, name, _dense_ties(known))
            _make_dense(self, layers)
            shipped(self, *args, **kwargs)
            made = _quantized_again(self, layers)
        except BaseException:
            made = layers
            raise
        finally:
            for name, layer in made.items():
                put_layer(self, name, layer)
            for name, known in ties.items():
                setattr(self, name, known)
        name_weights(self)
        tell_hosts(self)
        return self.get_input_embeddings()

    return resize_token_embeddings


def _vocabulary_layers(model: Any) -> dict[str, Any]:
    """Return the layers in four bits that have a row a token, by name.

    Raises:
        ValueError: one of them has adapters, nf4's or PEFT's.
    """
    found = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(get())
        except NotImplementedError:  # a model of several towers
            continue
    for layer in (m for m in found if m is not None):
        inside = any(isinstance(m, QuantizedModule) for m in layer.modules())
        if inside and (isinstance(layer, AdaptedLayer) or not isinstance(layer, QuantizedModule)):
            raise ValueError(
                f"resize_token_embeddings: expected embeddings and an output layer without "
                f"adapters, got a {type(layer).__name__}; resize before adding adapters"
            )
    weights = {id(m.packed) for m in found if isinstance(m, QuantizedModule)}
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedModule) and (id(module.packed) in weights or module in found)
    }
    for name, layer in layers.items():
        check_forward(name, layer)
        if layer.weight.shape[1] % 2 or layer.packed.is_meta:
            raise ValueError(
                f"resize_token_embeddings: expected weights with values and an even number of "
                f"columns, got {name} {tuple(layer.weight.shape)} on {layer.packed.device}"
            )
    return layers


_TIES = ("_tied_weights_keys", "all_tied_weights_keys")


def _dense_ties(ties: Any) -> Any:
    """Return which dense weights are tied, of which parts of 4-bit weights are."""
    if not isinstance(ties, dict):
        return ties
    return {
        _weight_of(target): _weight_of(source)
        for target, source in ties.items()
        if target.rpartition(".")[2] not in ("absmax", "absmax2", "offset")
    }


def _weight_of(name: str) -> str:
    layer, _, part = name.rpartition(".")
    return f"{layer}.weight" if part == "packed" else name


def _make_dense(model: Any, layers: dict[str, Any]) -> None:
    """Replace layers by dense ones; those that are tied have one weight."""
    shared: dict[str, Any] = {}
    for name, layer in layers.items():
        source = _source(model, name)
        make = layer.to_embedding if isinstance(layer, EmbeddingNF4) else layer.to_linear
        dense = make(shared.get(source))
        shared[source] = dense.weight
        put_layer(model, name, dense)


def _source(model: Any, name: str) -> str:
    """Return the name of the layer that a layer's weight is tied to, its own if to none."""
    source: str = model.all_tied_weights_keys.get(f"{name}.weight", f"{name}.weight")
    return source.removesuffix(".weight")


def _quantized_again(model: Any, layers: dict[str, Any]) -> dict[str, Any]:
    """Return layers in four bits with the rows that their dense ones have now."""
    weights: dict[str, NF4Tensor] = {}
    made = {}
    for name, old in layers.items():
        dense, source = model.get_submodule(name), _source(model, name)
        if source not in weights:
            weights[source] = resized(old.weight, dense.weight)
        new = quantized_layer(dense, weights[source])
        take_hooks(new, old)
        weights[source] = new.weight  # its parameters, which the next ones share
        if isinstance(new, LinearNF4):
            new.take_after(old)
            if new.bias is not None and old.bias is not None:
                new.bias.requires_grad_(old.bias.requires_grad)
        made[name] = new
    return made
