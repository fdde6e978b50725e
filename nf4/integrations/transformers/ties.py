"""Weights that are tied to embeddings in four bits: which, and how they stay so."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from nf4.integrations.transformers.config import NF4Config
from nf4.integrations.wrapping import wrap_once
from nf4.layers.module import BUFFERS, QuantizedModule
from nf4.models.readers import read_layers
from nf4.models.selection import is_below, resolve_skip, token_embeddings


def install() -> None:
    """Let every transformers model tie the scales of 4-bit weights that are buffers; once."""
    wrap_once(PreTrainedModel, "get_parameter", _with_scales)


def _with_scales(shipped: Callable[..., Any]) -> Callable[..., Any]:
    def get_parameter(self: Any, target: str) -> Any:
        module, _, name = target.rpartition(".")
        if name in BUFFERS:
            layer = self.get_submodule(module)
            if isinstance(layer, QuantizedModule) and layer._buffers.get(name) is not None:
                return layer._buffers[name]
        return shipped(self, target)

    return get_parameter


def tied_to_embeddings(model: Any, config: NF4Config) -> list[tuple[str, str]]:
    """Return which weights, by name, are tied to those of embeddings that are quantized."""
    skip = resolve_skip(config.skip_modules, ())
    left = {id(m) for n, m in model.named_modules() if is_below(n, skip)}
    embeddings = token_embeddings(model) - left - read_layers(model).keys()
    return [
        (target, source)
        for target, source in model.all_tied_weights_keys.items()
        if id(model.get_submodule(source.rpartition(".")[0])) in embeddings
    ]


def tie_now(model: Any, config: NF4Config) -> dict[str, str]:
    """Tie weights to those of the embeddings now; transformers does when all is loaded.

    Returns:
        The embeddings by the names of the layers that are tied to them.
    """
    tied = {}
    for target, source in tied_to_embeddings(model, config):
        module, _, name = target.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(source))
        tied[module] = source.rpartition(".")[0]
        del model.all_tied_weights_keys[target]
    return tied


def tied_parts(model: Any) -> set[str]:
    """Return the names of parts that are tied to others."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {name for pair in ties.items() for name in pair}
