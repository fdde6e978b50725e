"""Convert whole models: quantize the linears, add adapters, merge them back."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nf4.embedding import EmbeddingNF4, is_embedding
from nf4.experts import PARTS, ExpertsNF4, is_experts
from nf4.functional import check_block_size, check_weight, quantize
from nf4.linear import (
    LinearNF4,
    QLoRALinear,
    check_lora_options,
    dense_weight,
    is_conv1d,
    is_linear,
)
from nf4.tensor import NF4Tensor

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)
# torch.nn.MultiheadAttention reads the weight of its out_proj instead of calling the layer.
_READ_BY_ATTENTION = nn.modules.linear.NonDynamicallyQuantizableLinear


def quantize_model(
    model: Model,
    skip_modules: str | Iterable[str] = ("lm_head",),
    block_size: int = 64,
    double_quant: bool = True,
    progress: Callable[[int, int], None] | None = None,
    quantize_embeddings: bool = False,
) -> Model:
    """Replace every linear layer of a model by a `LinearNF4`, in place.

    ``torch.nn.Linear`` and transformers' ``Conv1D`` are replaced, and the experts of a mixture that
    are kept as tensors of three dimensions, by `ExpertsNF4`; subclasses with a forward of their own
    stay, and so do layers that ``torch.nn.MultiheadAttention`` reads instead of calling.
    Dense weights are freed one by one: the memory needed beyond the model is one layer's. An output
    layer tied to the embeddings shares their 4-bit weight; on a GPU each holds it in its own order.

    Args:
        model: any module; changed in place, and only after every layer has been checked.
        skip_modules: modules to leave as they are, with all that is below them: a list of names,
            whole ones or their last parts, such as ``"lm_head"`` or ``"mlp.down_proj"``, or one
            regular expression for the whole name.
        block_size: elements that share one scale, a power of two from 32 to 4096.
        double_quant: quantize the scales to 8 bits too.
        progress: called with (layers done, layers in all) after each layer.
        quantize_embeddings: replace the embeddings of tokens by `EmbeddingNF4` too: what
            ``get_input_embeddings`` returns, or every ``torch.nn.Embedding`` of a model that has
            no such method.

    Returns:
        The model; a new `LinearNF4` if the model itself is a linear layer.

    Raises:
        TypeError: model is no module, or a weight has an unsupported dtype.
        ValueError: block_size is not supported, skip_modules no expression, no linear layer is
            found, of two layers that share a weight one is to be skipped, the model has PEFT's
            adapters, or a weight holds NaN or an infinity; the message names the layer.
    """
    check_model(model)
    block_size = check_block_size(block_size)
    skip_modules = check_skip_modules(skip_modules)
    wrapped = [m for m in model.modules() if type(m).__module__.startswith("peft.")]
    if wrapped:
        raise ValueError(
            f"model: expected a model without adapters, got PEFT's {type(wrapped[0]).__name__}; "
            "quantize the base model first, then add adapters with nf4.add_lora"
        )
    layers = dense_layers(model, skip_modules, quantize_embeddings)
    if not layers:
        raise ValueError(
            f"model: expected at least one nn.Linear or Conv1D to quantize, found none in "
            f"{type(model).__name__} (skip_modules={skip_modules})"
        )
    for name, layer in layers.items():
        check_layer(name, layer)
    groups = tied_layers(layers)
    of_group: dict[int | None, NF4Tensor] = {}

    def quantized(weight: Tensor) -> NF4Tensor:
        return quantize(weight, block_size, double_quant, check=True)

    def convert(layer: nn.Module) -> nn.Module:
        if is_experts(layer):
            return ExpertsNF4(layer, lambda weight: LinearNF4.from_weight(quantized(weight)))
        ((_, weight),) = dense_weights(layer)
        group = groups.get(id(layer))
        new = quantized_layer(layer, of_group[group] if group in of_group else quantized(weight))
        if group is not None:
            of_group[group] = new.weight
        return new

    return replace_layers(model, layers, convert, progress)


def add_lora(
    model: Model,
    r: int = 16,
    lora_alpha: float = 32,
    target_modules: str | Iterable[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
) -> Model:
    """Add a trainable low-rank adapter to quantized layers, and freeze everything else.

    Args:
        model: a module with `LinearNF4` layers; changed in place.
        r: rank of the adapters, at least 1.
        lora_alpha: numerator of the scaling.
        target_modules: as in PEFT: ``"all-linear"`` for every `LinearNF4`; another string is a
            regular expression for the whole name; a list holds whole names or their last parts.
        lora_dropout: probability of dropping an input of the adapter in training, in [0, 1).
        use_rslora: scale by lora_alpha / sqrt(r) instead of lora_alpha / r.

    Returns:
        The model; a new `QLoRALinear` if the model itself is the layer.

    Raises:
        TypeError: model is no module, an option has the wrong type, or a target is a dense layer.
        ValueError: no module matches target_modules, a target has an adapter already, or an option
            is out of range.
    """
    check_model(model)
    check_lora_options(r, lora_alpha, lora_dropout)
    targets = _match_targets(model, target_modules)

    def convert(layer: LinearNF4) -> QLoRALinear:
        return QLoRALinear.from_weight(
            layer.weight,
            layer.bias,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
        ).train(layer.training)

    model = replace_layers(model, targets, convert)
    freeze_base(model)
    return model


def merge(model: Model) -> Model:
    """Make every quantized layer dense again, adapters folded in.

    Layers become ``torch.nn.Linear``, experts and embeddings what they were. What shared its 4-bit
    weight shares the dense one, unless an adapter tells them apart.

    The weight is the dequantized one plus the adapter's product, added in fp32 and rounded once to
    the layer's dtype.

    Args:
        model: a module with `LinearNF4` or `QLoRALinear` layers; changed in place.

    Returns:
        The model; a new ``nn.Linear`` if the model itself is the layer.

    Raises:
        TypeError: model is no module.
        ValueError: the model has no quantized layer.
    """
    check_model(model)
    layers = quantized_layers(model)
    embeddings = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, EmbeddingNF4)
    }
    if not layers and not embeddings:
        raise ValueError(f"model: expected LinearNF4 layers, found none in {type(model).__name__}")

    experts = {n: m for n, m in model.named_modules() if isinstance(m, ExpertsNF4)}
    inside = tuple(f"{name}." for name in experts)
    layers = {n: m for n, m in layers.items() if not (inside and n.startswith(inside))}
    shared: dict[int, Any] = {}

    def to_embedding(module: EmbeddingNF4) -> nn.Module:
        dense = module.to_embedding(shared.get(module.packed.data_ptr()))
        shared[module.packed.data_ptr()] = dense.weight
        return dense

    def to_linear(layer: LinearNF4) -> nn.Module:
        weight = shared.get(layer.packed.data_ptr())
        adapted = isinstance(layer, QLoRALinear)
        return layer.to_linear() if adapted or weight is None else layer.to_linear(weight)

    model = replace_layers(model, experts, lambda module: module.to_experts())
    model = replace_layers(model, embeddings, to_embedding)
    return replace_layers(model, layers, to_linear)


def dense_layers(
    model: nn.Module, skip_modules: str | Iterable[str], embeddings: bool = False
) -> dict[str, nn.Module]:
    """Return the layers `quantize_model` would replace, by name.

    Raises:
        TypeError: embeddings is no bool.
        ValueError: of an embedding and a layer that share a weight, only one is skipped.
    """
    if not isinstance(embeddings, bool):
        raise TypeError(f"quantize_embeddings: expected a bool, got {type(embeddings).__name__}")
    skip = check_skip_modules(skip_modules)
    modules = dict(model.named_modules(remove_duplicate=False))
    skipped = {id(module) for name, module in modules.items() if _is_below(name, skip)}
    wanted = token_embeddings(model) if embeddings else set()
    layers = {
        name: module
        for name, module in modules.items()
        if (id(module) in wanted or is_linear(module) or is_conv1d(module) or is_experts(module))
        and not isinstance(module, _READ_BY_ATTENTION)
        and all(weight.numel() for _, weight in dense_weights(module))
        and id(module) not in skipped
    }
    if wanted:
        _check_ties(modules, layers)
    return layers


def token_embeddings(model: nn.Module) -> set[int]:
    """Return the ids of the modules that `quantize_model` takes for embeddings of tokens."""
    get = getattr(model, "get_input_embeddings", None)
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and is_embedding(m)]
    if get is not None:
        weight = getattr(get(), "weight", None)
        embeddings = [m for m in embeddings if m.weight is weight]
    return {id(m) for m in embeddings}


def _check_ties(modules: dict[str, nn.Module], layers: dict[str, nn.Module]) -> None:
    """Raise unless what shares its weight with an embedding to quantize is to be quantized too."""
    embeddings = {id(m.weight): n for n, m in layers.items() if isinstance(m, nn.Embedding)}
    for name, module in modules.items():
        source = embeddings.get(id(getattr(module, "weight", None)))
        if source is not None and name not in layers:
            raise ValueError(
                f"{name}: expected to quantize it with {source}, whose weight it shares, but it is "
                "left out; leave it out of skip_modules, or let quantize_embeddings be False"
            )


def tied_layers(layers: dict[str, nn.Module]) -> dict[int, int]:
    """Return, by the id of each layer that shares its weight with another, the weight's id."""
    weights = {id(layer): id(layer.weight) for layer in layers.values() if not is_experts(layer)}
    counts = Counter(weights.values())
    return {layer: weight for layer, weight in weights.items() if counts[weight] > 1}


def quantized_layer(old: nn.Module, q: NF4Tensor) -> LinearNF4 | EmbeddingNF4:
    """Return what takes the place of a dense linear layer or embedding, around its weight."""
    if isinstance(old, nn.Embedding):
        return EmbeddingNF4(old, q)
    bias: Any = old.bias
    return LinearNF4.from_weight(q, bias).train(old.training)


def quantized_layers(model: nn.Module) -> dict[str, LinearNF4]:
    """Return the `LinearNF4` and `QLoRALinear` layers of a model, by name."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LinearNF4)
    }


def freeze_base(model: nn.Module) -> None:
    """Let no parameter of a model need a gradient but those of adapters it has."""
    adapters = [m for m in model.modules() if isinstance(m, QLoRALinear)]
    kept = {id(p) for m in adapters for p in (m.lora_A, m.lora_B)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def dense_weights(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the weights that are to be quantized of a dense layer or of experts, with names."""
    if is_experts(layer):
        return [(name, getattr(layer, name)) for name in PARTS]
    if isinstance(layer, nn.Embedding):
        return [("weight", layer.weight)]
    return [("weight", dense_weight(layer))]


def check_layer(name: str, layer: nn.Module) -> None:
    """Raise TypeError or ValueError, naming the layer, unless its weights can be quantized."""
    for part, weight in dense_weights(layer):
        weight = weight.detach()
        check_weight(weight, f"{name}.{part}")
        if not weight.is_meta and not all(m.isfinite() for m in torch.aminmax(weight)):
            raise ValueError(f"{name}.{part}: expected finite values, got NaN or an infinity")


def check_names(names: Iterable[str], name: str) -> tuple[str, ...]:
    """Return names as a tuple, or raise TypeError unless they are a list of strings."""
    if isinstance(names, str):
        raise TypeError(f"{name}: expected a list of names, got the string {names!r}")
    if not isinstance(names, Iterable):
        raise TypeError(f"{name}: expected a list of names, got {type(names).__name__}")
    found = tuple(names)
    for one in found:
        if not isinstance(one, str):
            raise TypeError(f"{name}: expected names, got {one!r}")
    return found


def match_names(names: Iterable[str], targets: Iterable[str]) -> set[str]:
    """Return the names that a list of targets means to PEFT: equal, or ending in ``.target``."""
    targets = tuple(targets)
    ends = tuple(f".{target}" for target in targets)
    return {name for name in names if name in targets or name.endswith(ends)}


def check_skip_modules(skip_modules: str | Iterable[str]) -> str | tuple[str, ...]:
    """Return a regular expression, or names as a tuple; raise if it is neither."""
    if not isinstance(skip_modules, str):
        return check_names(skip_modules, "skip_modules")
    _compile(skip_modules, "skip_modules")
    return skip_modules


def _compile(pattern: str, name: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        message = f"{name}: expected a regular expression, got {pattern!r}: {error}"
        raise ValueError(message) from error


def _is_below(name: str, skip: str | Iterable[str]) -> bool:
    """Return whether a name, or that of a module it is inside of, is one of those to skip."""
    parts = name.split(".")
    if isinstance(skip, str):
        ends = range(1, len(parts) + 1)
        return any(re.fullmatch(skip, ".".join(parts[:end])) for end in ends)
    return any(
        parts[end - len(suffix) : end] == suffix
        for suffix in (s.split(".") for s in skip)
        for end in range(len(suffix), len(parts) + 1)
    )


def _match_targets(model: nn.Module, targets: str | Iterable[str]) -> dict[str, LinearNF4]:
    layers = quantized_layers(model)
    if targets == "all-linear":
        matched: dict[str, nn.Module] = {**layers}
    else:
        modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
        if isinstance(targets, str):
            pattern = _compile(targets, "target_modules")
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
        if isinstance(module, QLoRALinear):
            raise ValueError(f"{name}: expected a layer without adapter, got one with r={module.r}")
        if not isinstance(module, LinearNF4):
            raise TypeError(
                f"{name}: expected a LinearNF4 (nf4.quantize_model makes them), "
                f"got {type(module).__name__}"
            )
    objects = {id(module) for module in matched.values()}
    return {name: layer for name, layer in layers.items() if id(layer) in objects}


def replace_layers(
    model: Model,
    layers: dict[str, Layer],
    convert: Callable[[Layer], nn.Module],
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Replace the named layers, which leave the dict one by one, and return the model.

    A layer that has several names stays one layer. Forward and backward hooks go with it.
    """
    names: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if "forward" in vars(layer):
            raise ValueError(
                f"{name}: expected a layer with the forward of its class, got one of its own"
                " (an offloading hook, for example); remove it first"
            )
        names.setdefault(id(layer), []).append(name)
    for done, group in enumerate(names.values(), start=1):
        old = [layers.pop(name) for name in group][0]
        new = convert(old)
        for hooks in (h for h in vars(old) if h.endswith(("_hooks", "_hooks_with_kwargs"))):
            if new is not old and not hooks.startswith(("_state_dict", "_load_state_dict")):
                setattr(new, hooks, getattr(old, hooks))
        del old
        for name in group:
            parent, _, child = name.rpartition(".")
            if child:
                setattr(model.get_submodule(parent), child, new)
            else:
                model = new  # type: ignore[assignment]
        if progress is not None:
            progress(done, len(names))
    return model
