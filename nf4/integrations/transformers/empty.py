"""Quantized layers on meta, whose values are to be loaded: which, and how they are made."""

from typing import Any

from torch import Tensor, nn

from nf4.functional import quantize
from nf4.integrations.transformers.config import NF4Config
from nf4.integrations.transformers.stored import Stored, forms_in_model, is_part
from nf4.layers.experts import ExpertsNF4, is_experts
from nf4.layers.linear import LinearNF4
from nf4.models.quantize import quantized_layer, replace_layers, tie_parts
from nf4.models.selection import dense_layers, dense_weights
from nf4.tensor import NF4Tensor


def layers_in_files(
    model: Any, stored: dict[str, Stored], config: NF4Config, tied: dict[str, str]
) -> dict[str, nn.Module]:
    """Return the layers of which the files hold 4-bit weights, by name.

    The files decide, not skip_modules, which was that of the model that was saved: another head
    may be on it now, which is dense and new.

    Args:
        model: dense.
        stored: what the files hold, by names in the model.
        config: of the checkpoint.
        tied: embeddings by the names of layers that are tied to them.
    """
    layers = dense_layers(model, (), config.quantize_embeddings, also_read=True)
    held = {name.rpartition(".")[0] for name in stored if is_part(name)}
    inside = {name.rpartition(".")[0].rpartition(".")[0] for name in held}
    return {
        name: layer
        for name, layer in layers.items()
        if tied.get(name, name) in held or (is_experts(layer) and name in inside)
    }


def make_empty(
    model: Any, layers: dict[str, nn.Module], config: NF4Config, tied: dict[str, str]
) -> None:
    """Replace layers by quantized ones on meta, whose values are to be loaded."""
    names = {id(layer): name for name, layer in reversed(layers.items())}
    forms = forms_in_model(config.forms or {}, model)

    def empty(name: str, weight: Tensor) -> NF4Tensor:
        form = forms.get(name, (config.block_size, config.double_quant))
        return quantize(weight, *form)

    def convert(old: nn.Module) -> nn.Module:
        name = names[id(old)]
        if is_experts(old):
            return ExpertsNF4(
                old, lambda part, weight: LinearNF4.from_weight(empty(f"{name}.{part}", weight))
            )
        ((_, weight),) = dense_weights(old)
        return quantized_layer(old, empty(name, weight))

    replace_layers(model, layers, convert)
    tie_parts(model, tied)
