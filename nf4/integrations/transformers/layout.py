"""How a folder's model and the tensors in its files belong together, for adapters to be folded."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from nf4.files.architectures import Layout, Place, StoredLayer
from nf4.integrations.transformers.dense_layers import check_complete, model_on_meta
from nf4.integrations.transformers.stored import model_names
from nf4.layers.experts import is_experts
from nf4.layers.linear import dense_weight, is_conv1d
from nf4.models.selection import dense_layers
from nf4.tools.shards import Shards


def layout(
    shards: Shards, stored: Sequence[StoredLayer], names: Iterable[str], dtype: str
) -> Layout:
    """Return where the weights of a model's linear layers are in a folder.

    Args:
        shards: the files.
        stored: the weights in four bits.
        names: of the tensors, were all of them dense.
        dtype: that the model is to have, as ``config.json`` calls it.

    Raises:
        ValueError: transformers cannot make the model, or files of a dense one do not hold all.
    """
    model = model_on_meta(shards.folder)
    if not stored:
        check_complete(model, shards)
    own = model_names(names, model)
    files = {parameter: name for name, parameter in reversed(own.items())}
    ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    places = _linear(model, files, ties)
    for layer in (s for s in stored if s.kind == "experts"):
        inside = model_names((f"{name}.packed" for name in layer.names), model)
        for number, name in enumerate(layer.names):
            module = inside[f"{name}.packed"].removesuffix(".packed")
            form = (layer.becomes, layer.becomes, layer.shape, False, number)
            places[module] = Place(module, *form)
    biases = {parameter: name for parameter, name in files.items() if parameter.endswith("bias")}
    return Layout(places, biases, ties, _wide(model, own, getattr(torch, dtype)))


def _linear(model: Any, files: Mapping[str, str], ties: Mapping[str, str]) -> dict[str, Place]:
    """Return the place of every linear layer whose weight is in the files, by all its names."""
    layers = dense_layers(model, (), also_read=True)
    linear = {name: module for name, module in layers.items() if not is_experts(module)}
    known: dict[int, tuple[str, str]] = {}
    for name, module in linear.items():
        if f"{name}.weight" in files:
            known.setdefault(id(module), (name, files[f"{name}.weight"]))
    places = {}
    for name, module in linear.items():
        form = tuple(dense_weight(module).shape), is_conv1d(module), None
        source = files.get(ties.get(f"{name}.weight", ""))
        if id(module) in known:
            first, tensor = known[id(module)]
            places[name] = Place(first, tensor, tensor, *form)
        elif source is not None:
            places[name] = Place(name, source, f"{name}.weight", *form)
    return places


def _wide(model: Any, own: Mapping[str, str], dtype: torch.dtype) -> frozenset[str]:
    """Return the tensors that transformers keeps in fp32 in a model of another dtype."""
    find = getattr(model, "_get_dtype_plan", None)
    patterns = {} if find is None else find(dtype)
    wide = [re.escape(p).replace(r"\*", ".*") for p, to in patterns.items() if to == torch.float32]
    if not wide:
        return frozenset()
    known = re.compile("|".join(wide))
    return frozenset(name for name, parameter in own.items() if known.search(parameter))
