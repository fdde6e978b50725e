"""Put AdaMix's mixtures on a model, and average them after training.

Source: https://arxiv.org/abs/2205.12410, section 3; what they are, nf4/adapters/adamix.py says.
"""

from collections.abc import Iterable

import torch
from torch import nn

from nf4.adapters.adamix import AdaMix, check_mixture
from nf4.adapters.layer import AdaptedLayer
from nf4.adapters.lora import (
    LoRA,
    check_lora_options,
)
from nf4.models.adapt import find_targets, layer_base, put_adapters, with_adapter
from nf4.models.quantize import Model, check_model, check_no_peft, replace_layers


def add_adamix(
    model: Model,
    r: int = 16,
    lora_alpha: float = 32,
    target_modules: str | Iterable[str] = "all-linear",
    lora_dropout: float = 0.0,
    *,
    num_modules: int = 4,
    share: str | None = None,
    adapter_name: str = "default",
) -> Model:
    """Add a mixture of LoRA modules to linear layers, and freeze everything else.

    In training mode a layer's forward computes with one A and one B, drawn at random apart from
    each other from torch's generator; in eval mode with the mean of each. Train with a task's loss
    on two forwards and `nf4.losses.consistency_loss` between them, then call `merge_adamix`.

    Args:
        model: a module with linear layers, `LinearNF4` or dense; changed in place.
        r: rank of each module, at least 1.
        lora_alpha: numerator of the scaling, lora_alpha / r.
        target_modules: as for `nf4.add_lora`.
        lora_dropout: probability of dropping an input of the adapter in training, in [0, 1).
        num_modules: As, and Bs, of a layer, at least 1.
        share: "A" for one A that all Bs share, "B" for one B, None for neither.
        adapter_name: by which the adapter is chosen.

    Returns:
        The model; a new layer if the model itself is the layer.

    Raises:
        TypeError: model is no module, an option has the wrong type, or a target is no linear layer.
        ValueError: no module matches target_modules, a target has an adapter of that name, or an
            option is out of range.

    Source: https://arxiv.org/abs/2205.12410, sections 3.1 to 3.4.
    """
    check_lora_options(r, lora_alpha, lora_dropout)
    check_mixture(num_modules, share)
    targets = find_targets(model, target_modules, adapter_name, AdaMix)

    def make(name: str, layer: nn.Module) -> nn.Module:
        form = (r, lora_alpha, lora_dropout, num_modules, share)
        return with_adapter(layer, adapter_name, AdaMix(layer_base(layer), *form))

    return put_adapters(model, targets, make, adapter_name)


def merge_adamix(model: Model, adapter_name: str | None = None) -> Model:
    """Average the modules of mixtures: plain LoRA adapters of the same names are left.

    They compute what the mixtures compute in eval mode; `nf4.save_adapter` writes them in PEFT's
    files, and `nf4.merge` folds them into the weights.

    Args:
        model: a module with mixtures; changed in place, and only after all have been checked.
        adapter_name: which mixtures; all by default.

    Returns:
        The model; a new layer if the model itself is the layer.

    Raises:
        TypeError: model is no module.
        ValueError: there is no mixture of that name, or one has modules of several ranks or of
            another layer's sizes, or values that are not finite.

    Source: https://arxiv.org/abs/2205.12410, section 3.3.
    """
    check_model(model)
    check_no_peft(model)
    layers: dict[str, AdaptedLayer] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, AdaptedLayer) and _mixtures(layer, adapter_name):
            layers[name] = layer
            for mixture in _mixtures(layer, adapter_name).values():
                _check_mergeable(name, layer, mixture)
    if not layers:
        which = "" if adapter_name is None else f" called {adapter_name!r}"
        raise ValueError(f"model: expected mixtures{which} (nf4.add_adamix), found none")
    return replace_layers(model, layers, lambda layer: _averaged(layer, adapter_name))


def _mixtures(layer: AdaptedLayer, adapter_name: str | None) -> dict[str, AdaMix]:
    return {
        name: adapter
        for name, adapter in layer.named_adapters().items()
        if isinstance(adapter, AdaMix) and adapter_name in (None, name)
    }


def _check_mergeable(name: str, layer: AdaptedLayer, mixture: AdaMix) -> None:
    """Raise ValueError unless the mean of a mixture's modules is an adapter of its layer."""
    (n, k), r = layer.base().weight.shape, mixture.r
    for part, tensor, shape in (("A", mixture.lora_A, (r, k)), ("B", mixture.lora_B, (n, r))):
        count = 1 if mixture.share == part else mixture.num_modules
        if tuple(tensor.shape) != (count, *shape):
            raise ValueError(
                f"{name}: expected lora_{part} of shape {(count, *shape)}, {count} modules of "
                f"rank {r}, got {tuple(tensor.shape)}"
            )
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite values in lora_{part}, got others")


@torch.no_grad()
def _averaged(layer: AdaptedLayer, adapter_name: str | None) -> AdaptedLayer:
    """Return a layer with LoRA in the place of mixtures: another one if it has nothing else."""
    mixtures, active = _mixtures(layer, adapter_name), layer.active_adapters
    alone = list(layer.named_adapters()) == list(mixtures) and len(mixtures) == 1
    new = layer
    for name, mixture in mixtures.items():
        lora, mean = LoRA(layer.base(), **mixture.options_of_lora), mixture.merged_term()
        lora.start_from(layer.base(), mean.lora_A, mean.lora_B)
        if alone:
            new = with_adapter(layer.to_base(), name, lora)
        else:
            layer.hold_adapter(name, lora)
    new.adapters_disabled, new.samples = layer.adapters_disabled, layer.samples
    new.set_adapter(*active)
    return new
