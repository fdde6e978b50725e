"""Which tensors of a folder are parts of 4-bit weights, and of which layers of its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nf4.files.architectures import StoredLayer
from nf4.integrations.transformers.config import NF4Config
from nf4.integrations.transformers.dense_layers import model_on_meta
from nf4.integrations.transformers.stored import forms_in_model, model_names
from nf4.layers.experts import PARTS as EXPERT_PARTS
from nf4.layers.experts import is_experts, with_expert_names
from nf4.models.selection import dense_layers, dense_weights
from nf4.tools.shards import Shards


def stored_layers(
    folder: Path, shards: Shards, said: Mapping[str, Any]
) -> tuple[list[StoredLayer], list[str]]:
    """Return the 4-bit weights of a folder, and the names of linear layers that are dense.

    Args:
        folder: with a ``config.json``.
        shards: its weight files.
        said: the ``quantization_config``.

    Raises:
        ValueError: transformers cannot make the model, or it has no layer for a weight.
    """
    try:
        config = NF4Config.from_dict(dict(said))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: quantization_config: {error}") from error
    model = model_on_meta(folder)
    every = dense_layers(model, (), also_read=True)
    embeddings = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    forms = forms_in_model(config.forms or {}, model)
    packed = [name for name in shards.tensors if name.rpartition(".")[2] == "packed"]
    layers: dict[str, StoredLayer] = {}
    held = set()
    for name, own in model_names(packed, model).items():
        module, stored = own.removesuffix(".packed"), name.removesuffix(".packed")
        block_size = forms.get(module, (config.block_size, True))[0]
        part = module.rpartition(".")[0]
        experts = every.get(part.rpartition(".")[0])
        if part.rpartition(".")[2] in EXPERT_PARTS and experts is not None and is_experts(experts):
            shape = tuple(getattr(experts, part.rpartition(".")[2]).shape[1:])
            old = stored.rpartition(".")[0]
            before = layers[old].names if old in layers else ()
            layers[old] = StoredLayer("experts", (*before, stored), old, shape, block_size)
            continue
        layer = every.get(module) or embeddings.get(module)
        if layer is None:
            raise ValueError(
                f"{shards.folder / shards.tensors[name].file}: {name}: expected a weight of a "
                f"layer of {type(model).__name__}, which has none of that name"
            )
        held.add(module)
        kind = "embedding" if module in embeddings else "linear"
        ((_, weight),) = dense_weights(layer)
        form = (stored,), f"{stored}.weight", tuple(weight.shape), block_size
        layers[stored] = StoredLayer(kind, *form)
    dense = [n for n, m in every.items() if n not in held and not is_experts(m)]
    return [_in_order(layer) for layer in layers.values()], dense


def _in_order(layer: StoredLayer) -> StoredLayer:
    """Return experts in the order of their numbers."""
    if layer.kind != "experts":
        return layer
    names = sorted(layer.names, key=lambda n: int(with_expert_names(n).rpartition("_")[2]))
    return StoredLayer(layer.kind, tuple(names), layer.becomes, layer.shape, layer.block_size)
