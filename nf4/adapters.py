"""Adapters of a whole model: add them, choose among them, switch them off."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nf4.convert import (
    Model,
    check_model,
    check_names,
    check_no_peft,
    compile_pattern,
    quantized_layers,
    replace_layers,
)
from nf4.experts import ExpertsNF4
from nf4.initialize import INITIALIZATIONS, check_rank, dense_source, initialize
from nf4.linear import (
    BaseChange,
    LinearNF4,
    LoRA,
    QLoRALinear,
    check_adapter_name,
    check_lora_options,
    lora_scaling,
)


def add_lora(
    model: Model,
    r: int = 16,
    lora_alpha: float = 32,
    target_modules: str | Iterable[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    *,
    use_dora: bool = False,
    adapter_name: str = "default",
    init_lora_weights: bool | str = True,
    original: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    bias: str = "none",
) -> Model:
    """Add a trainable low-rank adapter to quantized layers, and freeze everything else.

    A layer may have several adapters, by name; the one added last is active, see `set_adapter`.

    Args:
        model: a module with `LinearNF4` layers; changed in place.
        r: rank of the adapters, at least 1.
        lora_alpha: numerator of the scaling.
        target_modules: as in PEFT: ``"all-linear"`` for every `LinearNF4`; another string is a
            regular expression for the whole name; a list holds whole names or their last parts.
        lora_dropout: probability of dropping an input of the adapter in training, in [0, 1).
        use_rslora: scale by lora_alpha / sqrt(r) instead of lora_alpha / r.
        use_dora: learn the length of each row of the weight too
            (https://arxiv.org/abs/2402.09353).
        adapter_name: by which the adapter is chosen.
        init_lora_weights: True for PEFT's start, at which the adapter adds nothing. ``"pissa"``
            takes the largest singular vectors of the weight, and quantizes what is left as the new
            base (https://arxiv.org/abs/2404.02948); its files fit that base alone. ``"loftq"``
            takes those of what quantization lost (https://arxiv.org/abs/2310.08659, one
            alternation: the base stays); it needs original.
        original: the weights before quantization: the dense model, its state dict, or a folder of
            safetensors. PiSSA takes the dequantized ones without it.
        bias: which biases train too, and are saved with the adapter: "none", "lora_only" for those
            of layers with an adapter, or "all". Only for a model's only adapter.

    Returns:
        The model; a new `QLoRALinear` if the model itself is the layer.

    Raises:
        TypeError: model is no module, an option has the wrong type, or a target is a dense layer.
        ValueError: no module matches target_modules, a target has an adapter of that name already,
            an option is out of range, or a weight of original is missing or has another shape.
    """
    check_model(model)
    check_no_peft(model)
    check_lora_options(r, lora_alpha, lora_dropout, use_rslora, use_dora)
    check_adapter_name(adapter_name)
    check_bias(bias)
    others = [name for name in adapter_names(model) if name != adapter_name]
    modes = {layer.trained_biases for layer in _adapted(model)}
    if (others and {bias, *modes} != {"none"}) or modes - {bias}:
        raise ValueError(
            f"bias: expected {'one adapter' if others else 'one value'} for a model that trains "
            f"biases, got {bias!r} beside {', '.join(others) or ', '.join(modes)}"
        )
    if adapter_name in adapter_names(model) and base_change_of(model, adapter_name):
        raise ValueError(
            f"adapter_name: expected another name than {adapter_name!r}, which started by pissa"
        )
    kind = "" if init_lora_weights is True else init_lora_weights
    if kind not in ("", *INITIALIZATIONS):
        raise ValueError(
            f"init_lora_weights: expected True or one of {', '.join(INITIALIZATIONS)}, "
            f"got {init_lora_weights!r}"
        )
    targets = _match_targets(model, target_modules, adapter_name)
    adapted = [name for name, layer in targets.items() if isinstance(layer, QLoRALinear)]
    if kind == "pissa" and adapted:
        raise ValueError(
            f"{adapted[0]}: expected a layer without adapter for pissa, which changes the base"
        )
    for layer in targets.values() if kind else ():
        check_rank(r, layer.weight, str(kind))
    names = {id(layer): name for name, layer in targets.items()}
    source = dense_source(original, targets, needed=kind == "loftq") if kind else None
    options = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "use_dora": use_dora,
    }

    def convert(layer: LinearNF4) -> QLoRALinear:
        start = None
        if kind:
            dense = None if source is None else source(names[id(layer)])
            scaling = lora_scaling(r, lora_alpha, use_rslora)
            start = initialize(str(kind), layer.weight, dense, r, scaling)
        if isinstance(layer, QLoRALinear):
            layer.add_adapter(adapter_name, LoRA.of(layer.weight, **options))
            new = layer
        else:
            q = layer.weight if start is None else start.q
            new = QLoRALinear.from_weight(q, layer.bias, adapter_name=adapter_name, **options)
            new.take_after(layer)
            if kind == "pissa":
                change = BaseChange(str(kind), r, original is not None, adapter_name)
                new.base_change = change
        if start is not None:
            new.named_adapters()[adapter_name].start_from(new.weight, start.lora_A, start.lora_B)
        return new

    model = replace_layers(model, targets, convert)
    freeze_base(model)
    set_adapter(model, adapter_name)
    train_biases(model, bias)
    return model


def check_bias(bias: str) -> None:
    """Raise ValueError unless bias is one of PEFT's words for which biases train."""
    if bias not in ("none", "lora_only", "all"):
        raise ValueError(f"bias: expected none, lora_only or all, got {bias!r}")


def train_biases(model: nn.Module, bias: str) -> None:
    """Let biases need gradients beside a model's adapter, as `add_lora` has it."""
    for layer in _adapted(model):
        layer.trained_biases = bias
    for parameter in biases_of(model, bias).values():
        parameter.requires_grad_(True)


def biases_of(model: nn.Module, bias: str) -> dict[str, nn.Parameter]:
    """Return the biases that "none", "lora_only" or "all" means, by name."""
    adapted = {id(layer.bias) for layer in _adapted(model)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "bias"
        and (bias == "all" or (bias == "lora_only" and id(parameter) in adapted))
    }


def set_adapter(model: nn.Module, adapter_name: str | Iterable[str] | None) -> None:
    """Compute and train one adapter, several at once, or none.

    Args:
        model: a module with `QLoRALinear` layers; layers without an adapter of that name compute
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
    for layer in _adapted(model):
        layer.set_adapter(*names)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of a model's adapters, in the order in which they were added."""
    check_model(model)
    return list(dict.fromkeys(name for m in _adapted(model) for name in m.named_adapters()))


def base_change_of(model: nn.Module, adapter_name: str) -> BaseChange | None:
    """Return what changed the layers' base for an adapter, if anything has."""
    changes = [layer.base_change for layer in _adapted(model)]
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
        model: a module with `QLoRALinear` layers, in eval mode, whose inputs keep samples in their
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
        if isinstance(module, ExpertsNF4) and _adapted(module):
            raise ValueError(
                f"{name}: expected layers that see whole samples, got experts, which see tokens"
            )
    with _on_layers(model, "samples", names):
        yield


@contextmanager
def _on_layers(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of all layers with adapters within a ``with`` block."""
    before = [(layer, getattr(layer, name)) for layer in _adapted(model)]
    try:
        for layer, _ in before:
            setattr(layer, name, value)
        yield
    finally:
        for layer, old in before:
            setattr(layer, name, old)


def freeze_base(model: nn.Module) -> None:
    """Let no parameter of a model need a gradient but those of adapters it has."""
    adapters = [a for m in _adapted(model) for a in m.named_adapters().values()]
    kept = {id(p) for adapter in adapters for p in adapter.parameters_of_adapter()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def _match_targets(
    model: nn.Module, targets: str | Iterable[str], adapter_name: str
) -> dict[str, LinearNF4]:
    layers = quantized_layers(model)
    if targets == "all-linear":
        matched: dict[str, nn.Module] = {**layers}
    else:
        modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
        if isinstance(targets, str):
            pattern = compile_pattern(targets, "target_modules")
            matched = {n: m for n, m in modules.items() if pattern.fullmatch(n)}
        else:
            targets = list(check_names(targets, "target_modules"))
            named = match_names(modules, targets)
            matched = {n: m for n, m in modules.items() if n in named}
    if not matched:
        kinds = sorted({n.rpartition(".")[2] for n in layers})
        raise ValueError(
            f"target_modules: expected names of LinearNF4 layers, {targets!r} matches none; "
            f"the model has {', '.join(kinds) or 'no LinearNF4 (run nf4.quantize_model first)'}"
        )
    for name, module in matched.items():
        if isinstance(module, QLoRALinear) and adapter_name in module.named_adapters():
            raise ValueError(
                f"{name}: expected a layer without adapter {adapter_name!r}, got one with "
                f"r={module.named_adapters()[adapter_name].r}"
            )
        if not isinstance(module, LinearNF4):
            raise TypeError(
                f"{name}: expected a LinearNF4 (nf4.quantize_model makes them), "
                f"got {type(module).__name__}"
            )
    objects = {id(module) for module in matched.values()}
    return {name: layer for name, layer in layers.items() if id(layer) in objects}


def match_names(names: Iterable[str], targets: Iterable[str]) -> set[str]:
    """Return the names that a list of targets means to PEFT: equal, or ending in ``.target``."""
    targets = tuple(targets)
    ends = tuple(f".{target}" for target in targets)
    return {name for name in names if name in targets or name.endswith(ends)}


def _adapted(model: nn.Module) -> list[QLoRALinear]:
    return [module for module in model.modules() if isinstance(module, QLoRALinear)]


def _check_known(model: nn.Module, names: Iterable[str], option: str = "adapter_name") -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(
                f"{option}: expected one of {', '.join(known) or 'none: there is no adapter'}, "
                f"got {name!r}"
            )
