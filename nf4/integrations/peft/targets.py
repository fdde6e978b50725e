"""Which layers PEFT's configs mean in models whose experts are in four bits."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import peft.tuners.tuners_utils as peft_utils
import peft.utils.transformers_weight_conversion as peft_conversion
from peft import PeftType
from torch import nn

from nf4.layers.experts import PARTS, ExpertsNF4
from nf4.layers.linear import LinearNF4

# What the layers of experts were called before they were one tensor, by PEFT's name for the scheme
_OLD_NAMES = {"qwen2_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def experts_of(model: nn.Module) -> dict[str, ExpertsNF4]:
    """Return the experts in four bits of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ExpertsNF4)}


def is_converted(model: Any) -> bool:
    """Return whether PEFT itself makes parameters of experts out of their layers' old names."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known: Mapping[Any, str] = peft_conversion._MODEL_TO_CONVERSION_PATTERN
    return known.get(kind) in peft_conversion._MOE_TARGET_MODULE_MAPPING


def convert(
    shipped: Callable[..., None], peft_config: Any, model: Any, conversions: Any = None
) -> None:
    """Let a config of LoRA name experts as their layers were called before they were one tensor.

    In some kinds of models PEFT makes two parameters of each layer out of such names. In a model
    with `ExpertsNF4` they mean that in the other kinds too; layers beside the experts that are
    called alike have adapters of their own there.

    Args:
        shipped: PEFT's own function.
        peft_config: changed in place.
        model: to be adapted.
        conversions: what else PEFT passes on.
    """
    config, asked = peft_config, getattr(peft_config, "target_modules", None)
    experts, lora = experts_of(model), peft_config.peft_type == PeftType.LORA
    everything = isinstance(asked, str) and asked.lower() == "all-linear"  # see include_experts
    if not lora or is_converted(model) or not experts or not asked or everything:
        shipped(config, model, conversions)
        return
    single = [f"{n}.{part}.{e}" for n, m in experts.items() for part in PARTS for e in m.names]
    if _means(config, single):
        return
    beside = _beside(config, model, experts)
    for kind, names in _OLD_NAMES.items():
        if _means(config, [f"{name}.{old}" for name in experts for old in (*names, *PARTS)]):
            _convert_as(kind, config, model)
    if not isinstance(config.target_modules, str):
        named = {t for t in config.target_modules if t.rpartition(".")[2] in PARTS}
        config.target_modules = set(config.target_modules) - named
        config.target_parameters = {*(config.target_parameters or ()), *named} or None
        config.target_modules |= {n for n in beside if not _means(config, [n])}


def _means(config: Any, names: Iterable[str]) -> bool:
    """Return whether a config's targets are any of the modules of these names."""
    return any(peft_utils.check_target_module_exists(config, name) for name in names)


def _convert_as(kind: str, config: Any, model: Any) -> None:
    """Let PEFT convert a config as if a model were of a kind that it knows."""
    known, own = peft_conversion._MODEL_TO_CONVERSION_PATTERN, model.config.model_type
    known[own] = kind
    try:
        peft_conversion._convert_peft_config_moe(config, model)
    finally:
        del known[own]


def include_experts(config: Any, model: nn.Module) -> set[int]:
    """Let a config of "all-linear" mean experts too, by parameters of PEFT's where it can.

    PEFT's adapters on parameters know no dropout and no DoRA: with those each expert's layer gets
    an adapter of its own, which no dense model has a place for.

    Args:
        config: changed in place.
        model: to be adapted.

    Returns:
        The ids of modules that are no targets by themselves then.
    """
    experts = experts_of(model)
    inside = {id(m) for e in experts.values() for m in e.modules()}
    if not experts or is_converted(model):
        return inside
    if config.peft_type != PeftType.LORA or config.lora_dropout or config.use_dora:
        return set()
    names = {f"{name.rpartition('.')[2]}.{part}" for name in experts for part in PARTS}
    config.target_parameters = {*(config.target_parameters or ()), *names}
    return inside


def _beside(config: Any, model: nn.Module, experts: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of linear layers beside the experts that a config means."""
    inside = {id(m) for e in experts.values() for m in e.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LinearNF4 | nn.Linear)
        and id(module) not in inside
        and _means(config, [name])
    ]
