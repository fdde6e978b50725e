"""Adapters of a whole model, of any kind: put them on, choose among them, switch them off."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from nf4.adapters.layer import AdaptedLayer, BaseChange, adapted_layers, check_adapter_name
from nf4.adapters.lora import LoRA
from nf4.adapters.targets import match_names, match_targets
from nf4.adapters.term import Adapter, Base, base_of
from nf4.layers.dense import AdaptedDense
from nf4.layers.experts import ExpertsNF4, is_experts
from nf4.layers.linear import LinearNF4, dense_weight
from nf4.layers.qlora import AdaptedLinearNF4, QLoRALinear
from nf4.models.hosts import tell_hosts
from nf4.models.quantize import (
    Model,
    check_model,
    check_no_peft,
    check_parameters,
    replace_layers,
)
from nf4.models.selection import dense_layers
from nf4.ops.checks import check_names
from nf4.tools.ranks import is_sharded, reshard


def find_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    adapter_name: str,
    kind: type[Adapter],
    bias: str = "none",
) -> dict[str, nn.Module]:
    """Return the linear layers that an adapter is to be put on, by name; check all arguments.

    Args:
        model: a module with linear layers, in four bits or dense.
        target_modules: as in PEFT: ``"all-linear"`` for every `LinearNF4`, or, in a model without
            one, for every linear layer but the output layer; another string is a regular
            expression for the whole name; a list holds whole names or their last parts.
        adapter_name: of the adapter.
        kind: of the adapter.
        bias: which biases are to train beside it.

    Raises:
        TypeError: model is no module, a name no string, or a target no linear layer, or one whose
            weight is computed.
        ValueError: no module matches, a target has an adapter of that name, that name cannot be
            one or is that of an adapter of another kind or of a changed base, biases train with
            another adapter, or the model has PEFT's adapters.
    """
    check_model(model)
    check_no_peft(model)
    reshard(model)
    check_adapter_name(adapter_name)
    check_name_is_free(model, adapter_name, kind, bias)
    layers, missed = linear_layers(model), []
    if isinstance(target_modules, str) and target_modules == "all-linear":
        matched: dict[str, nn.Module] = _all_linear(model, layers)
    else:
        modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
        if not isinstance(target_modules, str):
            target_modules = [*check_names(target_modules, "target_modules")]
        named = match_targets(modules, target_modules, "target_modules")
        matched = {n: m for n, m in modules.items() if n in named and not inside(n, layers)}
        missed = _missed(modules, target_modules)
    if not matched:
        kinds = sorted({n.rpartition(".")[2] for n in layers})
        raise ValueError(
            f"target_modules: expected names of linear layers, {target_modules!r} matches none; "
            f"the model has {', '.join(kinds) or 'no linear layer'}"
        )
    found = set(map(id, layers.values()))
    for name, module in matched.items():
        if id(module) not in found:
            raise TypeError(
                f"{name}: expected a LinearNF4, torch.nn.Linear or Conv1D, "
                f"got {type(module).__name__}"
            )
        if isinstance(module, LinearNF4):
            check_parts(name, module, kind is LoRA)
        if not isinstance(module, LinearNF4 | AdaptedLayer):
            check_parameters(name, module)
        if isinstance(module, AdaptedLayer) and adapter_name in module.named_adapters():
            raise ValueError(
                f"{name}: expected a layer without adapter {adapter_name!r}, got one with "
                f"{module.named_adapters()[adapter_name].summary()}"
            )
    if missed:
        warnings.warn(
            f"target_modules: no module is called {', '.join(missed)}; nothing is adapted by it",
            stacklevel=3,
        )
    objects = {id(module) for module in matched.values()}
    return {name: layer for name, layer in layers.items() if id(layer) in objects}


def _missed(names: Iterable[str], targets: str | Iterable[str]) -> list[str]:
    """Return which of a list of targets match nothing."""
    names = list(names)
    listed = [] if isinstance(targets, str) else [*targets]
    return [repr(target) for target in listed if not match_names(names, [target])]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that adapters can be put on, by name."""
    dense = {n: m for n, m in dense_layers(model, (), also_read=True).items() if not is_experts(m)}
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LinearNF4 | AdaptedLayer) or name in dense
    }


def check_name_is_free(
    model: nn.Module, adapter_name: str, kind: type[Adapter], bias: str = "none"
) -> None:
    """Raise ValueError unless a model can have an adapter of a name beside those it has."""
    others = [name for name in adapter_names(model) if name != adapter_name]
    modes = {layer.trained_biases for layer in adapted_layers(model)}
    if (others and {bias, *modes} != {"none"}) or modes - {bias}:
        raise ValueError(
            f"bias: expected {'one adapter' if others else 'one value'} for a model that trains "
            f"biases, got {bias!r} beside {', '.join(others) or ', '.join(modes)}"
        )
    if base_change_of(model, adapter_name):
        raise ValueError(
            f"adapter_name: expected another name than {adapter_name!r}, which started by pissa"
        )
    held = (layer.named_adapters().get(adapter_name) for layer in adapted_layers(model))
    other = next((a for a in held if a is not None and not isinstance(a, kind)), None)
    if other is not None:
        raise ValueError(
            f"adapter_name: expected another name than {adapter_name!r}, which is one of kind "
            f"{other.peft_type}, for one of kind {kind.peft_type}"
        )


def inside(name: str, layers: Mapping[str, nn.Module]) -> bool:
    """Return whether a module is a part of a layer, such as one of its adapters."""
    parents = name.split(".")
    return any(".".join(parents[:end]) in layers for end in range(1, len(parents)))


def unwrapped(model: nn.Module) -> Any:
    """Return the module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _all_linear(model: Any, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    quantized: dict[str, nn.Module]
    quantized = {n: m for n, m in layers.items() if isinstance(m, LinearNF4)}
    if quantized:
        return quantized
    try:
        output = unwrapped(model).get_output_embeddings()
    except (AttributeError, NotImplementedError):  # none, or of several towers
        output = None
    return {name: layer for name, layer in layers.items() if layer is not output}


def put_adapters(
    model: Model,
    targets: dict[str, nn.Module],
    make: Callable[[str, nn.Module], nn.Module],
    adapter_name: str,
) -> Model:
    """Put an adapter on layers, let it be the one that is computed, and freeze everything else.

    Args:
        model: a module; changed in place.
        targets: layers by name, from `find_targets`.
        make: returns the layer with its new adapter for a name and a layer, see `with_adapter`.
        adapter_name: of the adapter.

    Returns:
        The model; a new layer if the model itself is the layer.
    """
    names = {id(layer): name for name, layer in targets.items()}
    model = replace_layers(model, targets, lambda layer: make(names[id(layer)], layer))
    call_layers(model)
    freeze_base(model)
    set_adapter(model, adapter_name)
    tell_hosts(model)
    return model


def call_layers(model: nn.Module) -> None:
    """Let torch's encoder layers call layers with adapters, instead of reading their weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, AdaptedDense) for child in module.children()
        ):
            module.activation_relu_or_gelu = 0  # what its fast path asks for


def layer_base(layer: nn.Module) -> Base:
    """Return the product of a linear layer, without the adapters it may have."""
    if isinstance(layer, LinearNF4) and layer.split is not None:
        return layer.split.base(layer)
    if isinstance(layer, AdaptedLayer | LinearNF4):
        return layer.base()
    bias: Any = layer.bias
    return base_of(dense_weight(layer), bias)


def check_parts(name: str, layer: LinearNF4, is_lora: bool) -> None:
    """Raise ValueError unless a layer of which a process may have a part can have an adapter.

    Args:
        name: of the layer.
        layer: to put it on.
        is_lora: whether the adapter is a plain LoRA.
    """
    if is_sharded(layer.packed):
        raise ValueError(
            f"{name}: expected a whole layer, or one that is split, to put an adapter on, got one "
            "of fully_shard, which comes after adapters"
        )
    if layer.split is not None and not is_lora:
        raise ValueError(
            f"{name}: expected a LoRA adapter without DoRA for a layer that is split, got another"
        )


def with_adapter(layer: nn.Module, adapter_name: str, adapter: Adapter) -> AdaptedLayer:
    """Return a linear layer with another adapter, which is not active yet unless it is the first.

    Args:
        layer: a `LinearNF4`, ``torch.nn.Linear`` or Conv1D, or one that has adapters already.
        adapter_name: of the adapter.
        adapter: what to put there.
    """
    if isinstance(layer, AdaptedLayer):
        adapted = layer
    elif not isinstance(layer, LinearNF4):
        adapted = AdaptedDense(layer)
    elif isinstance(adapter, LoRA):
        return QLoRALinear.with_lora(layer, adapter_name, adapter)
    else:
        adapted = AdaptedLinearNF4.from_weight(layer.weight, layer.bias).take_after(layer)
    adapted.add_adapter(adapter_name, adapter)
    return adapted


def check_bias(bias: str) -> None:
    """Raise ValueError unless bias is one of PEFT's words for which biases train."""
    if bias not in ("none", "lora_only", "all"):
        raise ValueError(f"bias: expected none, lora_only or all, got {bias!r}")


def train_biases(model: nn.Module, bias: str) -> None:
    """Let biases need gradients beside a model's adapter, as `add_lora` has it."""
    for layer in adapted_layers(model):
        layer.trained_biases = bias
    for parameter in biases_of(model, bias).values():
        parameter.requires_grad_(True)


def biases_of(model: nn.Module, bias: str) -> dict[str, nn.Parameter]:
    """Return the biases that "none", "lora_only" or "all" means, by name."""
    adapted = {id(layer.bias) for layer in adapted_layers(model)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "bias"
        and (bias == "all" or (bias == "lora_only" and id(parameter) in adapted))
    }


def set_adapter(model: nn.Module, adapter_name: str | Iterable[str] | None) -> None:
    """Compute and train one adapter, several at once, or none.

    Args:
        model: a module with adapters; layers without an adapter of that name compute
            their base alone.
        adapter_name: a name, a list of names, or None for the base alone.

    Raises:
        TypeError: model is no module, or adapter_name neither names nor None.
        ValueError: no layer has an adapter of that name; nothing is changed then.
    """
    check_model(model)
    if adapter_name is None:
        names: tuple[str, ...] = ()
    elif isinstance(adapter_name, str):
        names = (adapter_name,)
    else:
        names = check_names(adapter_name, "adapter_name")
    _check_known(model, names)
    for layer in adapted_layers(model):
        layer.set_adapter(*names)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of a model's adapters, in the order in which its layers name them."""
    check_model(model)
    return list(dict.fromkeys(name for m in adapted_layers(model) for name in m.named_adapters()))


def base_change_of(model: nn.Module, adapter_name: str) -> BaseChange | None:
    """Return what changed the layers' base for an adapter, if anything has."""
    changes = [layer.base_change for layer in adapted_layers(model)]
    return next((c for c in changes if c is not None and c.adapter_name == adapter_name), None)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Compute the base alone within a ``with`` block; backward belongs in it too."""
    check_model(model)
    with _on_layers(model, "adapters_disabled", True):
        yield


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[None]:
    """Compute each sample of a batch with an adapter of its own within a ``with`` block.

    Args:
        model: a module with adapters, in eval mode, whose inputs keep samples in their
            first dimension. Backward, if any, belongs in the block too.
        adapter_names: one name a sample; None for the base alone.

    Raises:
        TypeError: model is no module, or adapter_names no list of names.
        ValueError: no layer has an adapter of that name, the model is in training mode, an expert
            of a mixture has an adapter, or a batch of another size comes.
    """
    check_model(model)
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Iterable):
        raise TypeError(f"adapter_names: expected a list of names, got {adapter_names!r}")
    names = tuple(adapter_names)
    known = check_names([n for n in names if n is not None], "adapter_names")
    _check_known(model, known, "adapter_names")
    if model.training:
        raise ValueError("model: expected one in eval mode for adapters by sample, call eval()")
    for name, module in model.named_modules():
        if isinstance(module, ExpertsNF4) and adapted_layers(module):
            raise ValueError(
                f"{name}: expected layers that see whole samples, got experts, which see tokens"
            )
    with _on_layers(model, "samples", names):
        yield


@contextmanager
def _on_layers(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of all layers with adapters within a ``with`` block."""
    before = [(layer, getattr(layer, name)) for layer in adapted_layers(model)]
    try:
        for layer, _ in before:
            setattr(layer, name, value)
        yield
    finally:
        for layer, old in before:
            setattr(layer, name, old)


def freeze_base(model: nn.Module) -> None:
    """Let no parameter of a model need a gradient but those of adapters it has."""
    adapters = [a for m in adapted_layers(model) for a in m.named_adapters().values()]
    kept = {id(p) for adapter in adapters for p in adapter.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def _check_known(model: nn.Module, names: Iterable[str], option: str = "adapter_name") -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(
                f"{option}: expected one of {', '.join(known) or 'none: there is no adapter'}, "
                f"got {name!r}"
            )
