"""Which tensors of a transformers folder are weights of linear layers, by the model's class."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Plan:
    """What is to be done with a folder's tensors.

    Attributes:
        layers: names in the files of the weights to quantize, and whether each is a Conv1D's.
        config: for ``quantization_config`` of the folder's ``config.json``.
    """

    layers: dict[str, bool]
    config: dict[str, Any]


def make_plan(
    folder: Path,
    skip_modules: str | Iterable[str] | None,
    options: dict[str, Any],
    tensors: Iterable[str],
) -> Plan:
    """Return what `NF4Config` would quantize of a folder, but for experts.

    Args:
        folder: with a ``config.json``.
        skip_modules: None for what transformers leaves alone.
        options: of `NF4Config`.
        tensors: names in the files.

    Raises:
        ValueError: transformers does not know the model, it is quantized already, or no layer is
            left to quantize.
    """
    from nf4.integrations.transformers import NF4Config, NF4Quantizer

    model = _on_meta(folder)
    if model is None:
        raise ValueError(f"{folder}: expected a model that transformers can make, got another")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{folder}: expected a dense model, its config has a quantization_config")
    config = NF4Config(**options)
    if skip_modules is None:
        skip_modules = NF4Quantizer(config)._default_skip(model)
    layers = {n: m for n, m in dense_layers(model, skip_modules).items() if not is_experts(m)}
    if not isinstance(skip_modules, str):
        experts = [name for name, module in model.named_modules() if is_experts(module)]
        skip_modules = [*skip_modules, *experts]
    config.skip_modules = skip_modules
    names = model_names(tensors, model)
    found = {}
    for name, own in names.items():
        module, _, last = own.rpartition(".")
        if last == "weight" and module in layers:
            found[name] = is_conv1d(layers[module])
    if not found:
        raise ValueError(
            f"skip_modules: expected to leave a linear layer to quantize, {skip_modules} leaves "
            f"none in {type(model).__name__}"
        )
    return Plan(found, config.to_dict())


def _on_meta(folder: Path) -> Any:
    """Return the model of a folder without its weights."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            kind = getattr(transformers, (config.architectures or [""])[0], None)
            model = AutoModel.from_config(config) if kind is None else kind(config)
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
