"""Convert whole models: find the layers to quantize, and replace them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nf4.adapters.layer import AdaptedLayer
from nf4.functional import quantize
from nf4.layers.embedding import EmbeddingNF4
from nf4.layers.experts import ExpertsNF4, is_experts
from nf4.layers.linear import LinearNF4
from nf4.layers.module import check_when_loading, name_weights
from nf4.models.hosts import check_hosts, tell_hosts
from nf4.models.selection import DEFAULT_SKIP, check_skip_modules, dense_weights, select_layers
from nf4.models.spread import place_as, placing_hook
from nf4.ops.checks import check_block_size, check_scale, check_weight, check_weights
from nf4.tensor import PARTS, NF4Tensor

# What a module holds its hooks in, and how to call them
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")
Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)


def quantize_model(
    model: Model,
    skip_modules: str | Iterable[str] = DEFAULT_SKIP,
    block_size: int = 64,
    double_quant: bool = True,
    progress: Callable[[int, int], None] | None = None,
    quantize_embeddings: bool = False,
    scale: str = "absmax",
    weights: Mapping[str, Tensor] | None = None,
) -> Model:
    """Replace every linear layer of a model by a `LinearNF4`, in place.

    ``torch.nn.Linear`` and transformers' ``Conv1D`` are replaced, and the experts of a mixture that
    are kept as tensors of three dimensions, by `ExpertsNF4`; subclasses with a forward of their own
    stay, and so do layers whose weight the code around them reads instead of calling them, as
    Mamba's and ``torch.nn.MultiheadAttention`` do; a warning names both kinds.
    Dense weights are freed one by one: the memory needed beyond the model is one layer's. An output
    layer tied to the embeddings shares their 4-bit weight; on a GPU each holds it in its own order.

    Args:
        model: any module; changed in place, and only after every layer has been checked.
        skip_modules: modules to leave as they are, with all that is below them: a list of names,
            whole ones or their last parts, such as ``"lm_head"`` or ``"mlp.down_proj"``, or one
            regular expression for the whole name. They replace the default; names that all begin
            with a plus, such as ``"+mlp.gate"``, are added to it.
        block_size: elements that share one scale, a power of two from 32 to 4096.
        double_quant: quantize the scales to 8 bits too.
        progress: called with (layers done, layers in all) after each layer.
        quantize_embeddings: replace the embeddings of tokens by `EmbeddingNF4` too: what
            ``get_input_embeddings`` returns, or every ``torch.nn.Embedding`` of a model that has
            no such method.
        scale: how scales are found, see `nf4.quantize`.
        weights: for names of layers, what the columns of their weight count in the search for
            scales, as `nf4.collect_activation_stats` returns; layers without count all alike.

    Returns:
        The model; a new `LinearNF4` if the model itself is a linear layer.

    Raises:
        TypeError: model is no module, a weight has an unsupported dtype, or is computed, as those
            of pruned and weight-normed layers are.
        ValueError: block_size or scale is not supported, skip_modules no expression, no linear
            layer is found, of two layers that share a weight one is to be skipped, the model has
            PEFT's adapters, DeepSpeed ZeRO-3 has partitioned it, or a weight holds NaN or an
            infinity; the message names the layer.
    """
    check_model(model)
    block_size, scale = check_block_size(block_size), check_scale(scale)
    skip_modules = check_skip_modules(skip_modules)
    check_no_peft(model)
    check_no_adapters(model)
    check_not_partitioned(model)
    check_hosts(model)
    check_callback(progress, "progress")
    layers, skip = select_layers(model, skip_modules, quantize_embeddings)
    for name, layer in layers.items():
        check_layer(name, layer)
    groups = tied_layers(layers)
    of_group: dict[int | None, NF4Tensor] = {}
    counts = _column_weights(layers, groups, weights, scale)

    def quantized(weight: Tensor, columns: Tensor | None = None) -> NF4Tensor:
        return quantize(weight, block_size, double_quant, scale=scale, weights=columns, check=True)

    def convert(layer: nn.Module) -> nn.Module:
        if is_experts(layer):
            return ExpertsNF4(layer, lambda _, weight: LinearNF4.from_weight(quantized(weight)))
        ((_, weight),) = dense_weights(layer)
        group = groups.get(id(layer))
        if group in of_group:
            return quantized_layer(layer, of_group[group])
        columns = counts.get(id(layer) if group is None else group)
        new = quantized_layer(layer, quantized(weight, columns))
        if group is not None:
            of_group[group] = new.weight
        return new

    names = {name: groups[id(layer)] for name, layer in layers.items() if id(layer) in groups}
    first = {group: name for name, group in reversed(names.items())}
    model = replace_layers(model, layers, convert, progress)
    tie_parts(model, {name: first[group] for name, group in names.items() if first[group] != name})
    check_when_loading(model)
    name_weights(model)
    named = skip if isinstance(skip, str) else list(skip)
    tell_hosts(model, skip_modules=named, quantize_embeddings=quantize_embeddings, scale=scale)
    return model


def _column_weights(
    layers: dict[str, nn.Module],
    groups: dict[int, int],
    weights: Mapping[str, Tensor] | None,
    scale: str,
) -> dict[int, Tensor]:
    """Return what columns count, by the id of the layer, or of the weight that several share.

    Raises:
        TypeError: weights is no mapping, or one of it no floating tensor.
        ValueError: a name is no layer to quantize, or a tensor does not fit it; the message names
            the layer.
    """
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected tensors by name of layer, got {type(weights).__name__}")
    found = {}
    for name, columns in (weights or {}).items():
        layer = layers.get(name)
        if layer is None or is_experts(layer):
            raise ValueError(f"weights: expected names of linear layers to quantize, got {name!r}")
        ((_, weight),) = dense_weights(layer)
        try:
            columns = check_weights(columns, weight, scale)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        found[groups.get(id(layer), id(layer))] = columns
    return found


def tie_parts(model: Any, tied: dict[str, str]) -> None:
    """Let transformers tie the parts of 4-bit weights, as it ties dense ones; nothing elsewhere.

    Args:
        model: any module.
        tied: names of layers, by those of the layers that share their weight.
    """
    if not tied or not hasattr(model, "_tied_weights_keys"):
        return
    parts = {
        f"{target}.{part}": f"{source}.{part}"
        for target, source in tied.items()
        for part, tensor in zip(PARTS, model.get_submodule(source).weight.parts(), strict=True)
        if tensor is not None
    }
    weights = {f"{target}.weight" for target in tied}
    names = [n for n in ("all_tied_weights_keys", "_tied_weights_keys") if hasattr(model, n)]
    before = {name: getattr(model, name) for name in names}
    vars(model).setdefault("_dense_ties", before)
    for name, known in before.items():
        kept = {key: value for key, value in (known or {}).items() if key not in weights}
        setattr(model, name, kept | parts)


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
    return LinearNF4.from_weight(q, bias).take_after(old)


def quantized_layers(model: nn.Module) -> dict[str, LinearNF4]:
    """Return the `LinearNF4` and `QLoRALinear` layers of a model, by name."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LinearNF4)
    }


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def check_parameters(name: str, layer: nn.Module) -> None:
    """Raise TypeError unless a dense layer holds its weight, and bias, as they are."""
    for part in ("weight", "bias"):
        value = getattr(layer, part, None)
        if value is not None and not isinstance(value, nn.Parameter):
            raise TypeError(
                f"{name}: expected {part} to be a parameter, got one that is computed: remove "
                "parametrizations and pruning first (torch.nn.utils.prune.remove, "
                "remove_weight_norm, remove_spectral_norm, parametrize.remove_parametrizations)"
            )


def check_layer(name: str, layer: nn.Module) -> None:
    """Raise TypeError or ValueError, naming the layer, unless its weights can be quantized."""
    if not is_experts(layer):
        check_parameters(name, layer)
    for part, weight in dense_weights(layer):
        weight = weight.detach()
        check_weight(weight, f"{name}.{part}")
        if not weight.is_meta and not all(m.isfinite() for m in torch.aminmax(weight)):
            raise ValueError(f"{name}.{part}: expected finite values, got NaN or an infinity")


def check_no_peft(model: nn.Module) -> None:
    """Raise ValueError if a model has PEFT's adapters, which are PEFT's to save and merge."""
    kinds = ("peft.", "nf4.integrations.peft")
    wrapped = [m for m in model.modules() if type(m).__module__.startswith(kinds)]
    if wrapped:
        raise ValueError(
            f"model: expected a model without PEFT's adapters, got {type(wrapped[0]).__name__}; "
            "quantize before PEFT adds them, and save and merge them by PEFT's own methods"
        )


def check_no_adapters(model: nn.Module) -> None:
    """Raise ValueError if dense layers of a model have adapters: they would stay dense."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer) and not isinstance(module, LinearNF4):
            raise ValueError(
                f"model: expected a model without adapters, got them on {name}; quantize before "
                "adding them"
            )


def check_not_partitioned(model: nn.Module) -> None:
    """Raise ValueError if DeepSpeed ZeRO-3 has left an empty tensor in a parameter's place."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_shape") and not parameter.numel():
            raise ValueError(
                f"{name}: expected a whole parameter, got one that DeepSpeed ZeRO-3 has "
                "partitioned; quantize before, and use torch's fully_shard (FSDP2), or ZeRO-2"
            )


def check_callback(function: Callable[..., None] | None, name: str) -> None:
    """Raise TypeError unless function is None or can be called."""
    if function is not None and not callable(function):
        raise TypeError(f"{name}: expected a function, got {type(function).__name__}")


def check_forward(name: str, layer: nn.Module) -> None:
    """Raise ValueError if a layer has a forward of its own, which a replacement would lose.

    One that accelerate's ``device_map`` has given it, without offloading, `take_hooks` keeps.
    """
    if "forward" in vars(layer) and placing_hook(layer) is None:
        raise ValueError(
            f"{name}: expected a layer with the forward of its class, got one of its own"
            " (an offloading hook, for example); remove it first"
        )


def put_layer(model: Model, name: str, layer: nn.Module) -> Model:
    """Put a layer in the place of a name, and return the model: the layer where it is the model."""
    parent, _, child = name.rpartition(".")
    if not child:
        return layer  # type: ignore[return-value]
    setattr(model.get_submodule(parent), child, layer)
    return model


def take_hooks(new: nn.Module, old: nn.Module) -> None:
    """Give a layer the forward and backward hooks of the one whose place it takes."""
    for hooks in (h for h in vars(old) if h.endswith(_HOOKS)):
        if not hooks.startswith(("_state_dict", "_load_state_dict")):
            setattr(new, hooks, getattr(old, hooks))
    place_as(new, old)


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
        check_forward(name, layer)
        names.setdefault(id(layer), []).append(name)
    for done, group in enumerate(names.values(), start=1):
        old = [layers.pop(name) for name in group][0]
        new = convert(old)
        if new is not old:
            take_hooks(new, old)
        del old
        for name in group:
            model = put_layer(model, name, new)
        if progress is not None:
            progress(done, len(names))
    return model
