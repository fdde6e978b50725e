"""Which tensors of a transformers folder are weights of linear layers, by the model's class."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from nf4.files.architectures import Found, Plan
from nf4.integrations.transformers.stored import model_names
from nf4.layers.experts import is_experts
from nf4.layers.linear import is_conv1d
from nf4.models.selection import DEFAULT_SKIP, dense_layers, resolve_skip, warn_of_skipped
from nf4.tools.shards import Shards


def find(
    folder: Path, tensors: Iterable[str], skip_modules: str | Iterable[str]
) -> list[Found] | None:
    """Return the weights that `nf4.quantize_model` would quantize.

    Args:
        folder: with a ``config.json``.
        tensors: names in its files.
        skip_modules: see `nf4.quantize_model`.

    Returns:
        In the order of tensors; None if transformers does not know the class. Experts that have a
        tensor each are layers each.
    """
    try:
        model = model_on_meta(folder)
    except ValueError:  # of another library, or with code of its own
        return None
    skip = resolve_skip(skip_modules)
    warn_of_skipped(model, skip, DEFAULT_SKIP, stacklevel=5)
    return _find(model, tensors, skip)


def _find(model: Any, tensors: Iterable[str], skip_modules: str | Iterable[str]) -> list[Found]:
    layers = dense_layers(model, skip_modules)
    experts = tuple(f"{name}." for name, layer in layers.items() if is_experts(layer))
    found = []
    for tensor, own in model_names(tensors, model).items():
        module, _, last = own.rpartition(".")
        layer = layers.get(module)
        if last == "weight" and layer is not None and not is_experts(layer):
            found.append(Found(tensor, module, is_conv1d(layer)))
        elif experts and own.startswith(experts):
            found.append(Found(tensor, own.removesuffix(".weight"), False))
    return found


def make_plan(
    folder: Path,
    skip_modules: str | Iterable[str] | None,
    options: dict[str, Any],
    shards: Shards,
) -> Plan:
    """Return what `NF4Config` would quantize of a folder, but for experts.

    Args:
        folder: with a ``config.json``.
        skip_modules: None for what transformers leaves alone.
        options: of `NF4Config`.
        shards: its weight files.

    Raises:
        ValueError: transformers does not know the model, it is quantized already, its files do not
            hold all of it or tensors of other sizes, or no layer is left to quantize.
    """
    from nf4.integrations.transformers.config import NF4Config
    from nf4.integrations.transformers.quantizer import NF4Quantizer

    model = model_on_meta(folder)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{folder}: expected a dense model, its config has a quantization_config")
    config = NF4Config(**options)
    default = NF4Quantizer(config)._default_skip(model)
    skip = resolve_skip(skip_modules, default)
    experts = [name for name, module in model.named_modules() if is_experts(module)]
    config.skip_modules = skip if isinstance(skip, str) else [*skip, *experts]
    inside = tuple(f"{name}." for name in experts)
    layers = [
        f
        for f in _find(model, shards.tensors, config.skip_modules)
        if not f.layer.startswith(inside)
    ]
    found = {f.tensor: f.turned for f in layers}
    if not found:
        raise ValueError(
            f"skip_modules: expected to leave a linear layer to quantize, {skip} leaves "
            f"none in {type(model).__name__}"
        )
    check_complete(model, shards)
    warn_of_skipped(model, skip, default, experts=False, stacklevel=4)
    return Plan(found, config.to_dict())


# What transformers does to several tensors to make one of them, without losing an element
_JOINING = ("MergeModulelist", "Concatenate", "Transpose")


def check_complete(model: Any, shards: Shards) -> None:
    """Raise ValueError unless files hold every parameter of a model, in its size.

    Args:
        model: on meta.
        shards: the files.
    """
    conversions = get_model_conversion_mapping(model)
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    renamings = [c for c in conversions if not isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    own = model.state_dict()
    sizes: dict[str, int] = {}
    for name, held in shards.tensors.items():
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        converter = None if pattern is None else by_pattern[pattern]
        for target in _targets(key, converter):
            sizes[target] = sizes.get(target, 0) + math.prod(held.shape)
        if converter is None and key in own and tuple(own[key].shape) != held.shape:
            raise ValueError(
                f"{shards.folder / held.file}: {name}: expected shape {tuple(own[key].shape)} for "
                f"{type(model).__name__}, got {held.shape}"
            )
        joins = converter is not None and all(
            type(operation).__name__ in _JOINING for operation in converter.operations
        )
        if not joins:
            sizes.pop(key, None)
            sizes[key] = -1  # there, of whatever size
    _check_sizes(model, shards, sizes)


def _targets(key: str, converter: Any) -> list[str]:
    """Return the names of what a tensor becomes a part of."""
    patterns = [] if converter is None else list(converter.target_patterns)
    if len(patterns) < 2 or patterns[0] not in key:
        return [key]
    return [key.replace(patterns[0], pattern) for pattern in patterns]


def _check_sizes(model: Any, shards: Shards, sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless each parameter of a model is there, with all its elements.

    Args:
        model: on meta.
        shards: the files.
        sizes: elements found of it, by name; -1 where they are not to be counted.
    """
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name for pair in ties.items() if not set(pair).isdisjoint(sizes) for name in pair}
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = sizes.get(name)
        if found is None:
            if name in tied or any(re.search(pattern, name) for pattern in ignored):
                continue
            raise ValueError(
                f"{shards.folder}: expected {name} of {type(model).__name__} in the files, "
                "found none"
            )
        if found not in (-1, parameter.numel()):
            raise ValueError(
                f"{shards.folder}: expected {parameter.numel()} elements of {name} of "
                f"{type(model).__name__} in the files, found {found}"
            )


def model_on_meta(folder: Path) -> Any:
    """Return the model of a folder without its weights; code in the folder is not run.

    Raises:
        ValueError: transformers cannot make it; the message says why.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            kind = getattr(transformers, (config.architectures or [""])[0], None)
            if kind is None:
                return AutoModel.from_config(config, trust_remote_code=False)
            return kind(config)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder}: expected a model that transformers can make, got: {reason}"
        ) from error
