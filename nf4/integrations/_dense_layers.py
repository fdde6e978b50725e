"""Which tensors of a transformers folder are weights of linear layers, by the model's class."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel

from nf4.convert import dense_layers
from nf4.dense_files import DenseWeight
from nf4.experts import is_experts
from nf4.integrations._stored import model_names
from nf4.linear import is_conv1d


def find(
    folder: Path, tensors: Iterable[DenseWeight], skip_modules: str | Iterable[str]
) -> list[DenseWeight] | None:
    """Return the weights that `nf4.quantize_model` would quantize, as it would.

    Args:
        folder: with a ``config.json``.
        tensors: what its files hold, by whole names.
        skip_modules: see `nf4.quantize_model`.

    Returns:
        The weights by the names of their layers; None if transformers does not know the class.
    """
    model = _on_meta(folder)
    if model is None:
        return None
    layers = dense_layers(model, skip_modules)
    experts = tuple(f"{name}." for name, layer in layers.items() if is_experts(layer))
    held = list(tensors)
    names = model_names((t.name for t in held), model)
    found = []
    for tensor in held:
        module, _, last = names[tensor.name].rpartition(".")
        layer = layers.get(module)
        if last == "weight" and layer is not None and not is_experts(layer):
            found.append(_turned(tensor, module) if is_conv1d(layer) else _named(tensor, module))
        elif experts and names[tensor.name].startswith(experts) and len(tensor.shape) in (2, 3):
            found.append(_named(tensor, names[tensor.name].removesuffix(".weight")))
    return found


def _on_meta(folder: Path) -> torch.nn.Module | None:
    """Return the model of a folder without its weights."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            kind = getattr(transformers, (config.architectures or [""])[0], None)
            model: torch.nn.Module = AutoModel.from_config(config) if kind is None else kind(config)
    except Exception:  # of another library, or with code of its own: layers are told by their names
        return None
    return model


def _named(weight: DenseWeight, name: str) -> DenseWeight:
    return DenseWeight(name, weight.shape, weight.read)


def _turned(weight: DenseWeight, name: str) -> DenseWeight:
    """Return the weight of a Conv1D, ``[in_features, out_features]``, as that of a linear layer."""
    return DenseWeight(name, weight.shape[::-1], partial(_transposed, weight))


def _transposed(weight: DenseWeight) -> Tensor:
    return weight.read().T
