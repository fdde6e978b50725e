"""Save the adapters of a model, of any kind, and load them; LoRA and (IA)³ as PEFT's files."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nf4.adapters.layer import AdaptedLayer, BaseChange, adapted_layers, check_adapter_name
from nf4.adapters.lora import LoRA
from nf4.adapters.term import KINDS, Adapter
from nf4.files.adapters import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    AdapterFiles,
    read_config,
    read_metadata,
    read_tensors,
)
from nf4.layers.linear import LinearNF4
from nf4.models.adapt import (
    adapter_names,
    biases_of,
    call_layers,
    check_name_is_free,
    freeze_base,
    layer_base,
    linear_layers,
    set_adapter,
    shortest_targets,
    train_biases,
    unwrapped,
    with_adapter,
)
from nf4.models.hosts import tell_hosts
from nf4.models.quantize import check_model, check_no_peft, replace_layers
from nf4.models.starts import dense_source, initialize
from nf4.tools.paths import check_new, new_folder

# Of a file's metadata: whether a start took the weights before quantization
_FROM_ORIGINAL = "nf4_from_original"


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write a model's adapter in PEFT's files.

    Names are those of the model itself, without what torch.compile and DistributedDataParallel wrap
    around it. A mixture of `nf4.add_adamix` is written in a form of our own; PEFT opens what
    `nf4.merge_adamix` makes of it.

    Args:
        model: a module with adapters.
        path: folder to make; it must not exist. It appears only once it is complete.
        adapter_name: which adapter; by default the active one, or the only one.

    Raises:
        FileExistsError: path exists.
        TypeError: model is no module.
        ValueError: the model has no adapter of that name, several of which none was named, adapters
            on meta, adapters that one config cannot describe, or a base that another adapter's
            start has changed.
    """
    check_model(model)
    check_no_peft(model)
    path = check_new(path, "path")
    files = adapter_files(model, adapter_name)
    with new_folder(path) as folder:
        files.write(folder)


def adapter_files(
    model: nn.Module, adapter_name: str | None = None, with_base: bool = False
) -> AdapterFiles:
    """Return what is to be written of an adapter, all checked.

    Args:
        model: a module with adapters.
        adapter_name: which adapter; by default the active one, or the only one.
        with_base: whether the base is written beside it, as a start may have changed it, for
            transformers to open both.

    Raises:
        ValueError: as for `save_adapter`.
    """
    model = unwrapped(model)
    layers = adapter_layers(model, adapter_name)
    config = _adapter_config(model, layers)
    changes = None if with_base else _base_changes(model, layers)
    tensors = {}
    for name, adapter in layers.items():
        if any(t.is_meta for t in adapter.tensors().values()):
            raise ValueError(f"{name}: expected an adapter with values, got one on meta")
        if not all(p.isfinite().all() for p in adapter.parameters()):
            raise ValueError(f"{name}: expected an adapter of finite values to save, got others")
        others = {part: alias for alias, part in adapter.aliases.items()} if with_base else {}
        for part, tensor in adapter.tensors().items():
            end = others.get(part, part)
            key = f"{name}.{end}" if name else end
            tensors[PREFIX + key] = tensor.detach().cpu().contiguous()
    for name, parameter in biases_of(model, config.get("bias", "none")).items():
        module = _file_name(name.rpartition(".")[0])
        key = f"{module}.base_layer.bias" if module in layers else _file_name(name)
        tensors[PREFIX + key] = parameter.detach().cpu().contiguous()
    metadata = {}
    if changes is not None:
        config["init_lora_weights"] = changes.kind
        metadata[_FROM_ORIGINAL] = str(changes.from_original)
    return AdapterFiles(config, tensors, metadata)


@torch.no_grad()
def restore_adapter(model: nn.Module, path: str | os.PathLike[str], adapter_name: str) -> None:
    """Give an adapter that a model has the values of a file, in place.

    Args:
        model: a module with adapters.
        path: folder with the two files.
        adapter_name: of the adapter.

    Raises:
        FileNotFoundError: path or one of its two files is missing.
        ValueError: a file is corrupt, or holds another adapter than the model has; nothing is
            changed then.
    """
    path, model = Path(path), unwrapped(model)
    config, kind = read_config(path / CONFIG_NAME)
    found, biases = read_tensors(path / WEIGHTS_NAME, kind)
    held = adapter_layers(model, adapter_name)
    bias = config.get("bias") or "none"
    values = _find_biases(model, biases, bias, False, path / WEIGHTS_NAME)
    if found.keys() != held.keys():
        name = min(found.keys() ^ held.keys())
        raise ValueError(
            f"{path / WEIGHTS_NAME}: expected adapter {adapter_name!r} on the layers of the model, "
            f"got {'one more' if name in found else 'none'} on {name!r}"
        )
    for name, adapter in held.items():
        own, new = adapter.tensors(), found[name]
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in new.items()}:
            raise ValueError(
                f"{path / WEIGHTS_NAME}: {name}: expected tensors of the shapes "
                f"{ {n: tuple(t.shape) for n, t in own.items()} }, got "
                f"{ {n: tuple(t.shape) for n, t in new.items()} }"
            )
    for name, adapter in held.items():
        adapter.copy_from(found[name])
    for parameter, value in values:
        parameter.copy_(value)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str | None = None,
    original: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
) -> None:
    """Put an adapter saved by `save_adapter` or by PEFT on a model.

    Without a name the model has exactly the adapter of the file afterwards, called "default";
    with one, it is put beside those that are there. It is active and trainable, all else is frozen.
    An adapter that started by PiSSA changes the base as that start did, from the same weights.

    Args:
        model: a module with linear layers, `LinearNF4` or dense; changed in place, and only after
            the whole file has been checked.
        path: folder with PEFT's two files, or those of another kind.
        adapter_name: what to call it.
        original: the weights before quantization, see `nf4.add_lora`; needed for an adapter that
            started by PiSSA from them, on a base that is as `nf4.quantize_model` makes it.

    Raises:
        FileNotFoundError: path or one of its two files is missing.
        TypeError: model is no module.
        ValueError: a file is corrupt, holds no adapter of a kind known here, or one that does not
            fit the model or its base, a layer has an adapter of that name, or, without a name, one
            of another kind; the message names the file and the tensor.
    """
    path, beside = Path(path), adapter_name is not None
    name = "default" if adapter_name is None else adapter_name
    check_model(model)
    check_no_peft(model)
    check_adapter_name(name)
    model = unwrapped(model)
    config, kind = read_config(path / CONFIG_NAME)
    adapters, biases = read_tensors(path / WEIGHTS_NAME, kind)
    layers = linear_layers(model)
    if not beside:
        _check_kind(model, kind, path / CONFIG_NAME)
    elif name not in adapter_names(model):
        check_name_is_free(model, name, kind)
    bias = config.get("bias") or "none"
    values = _find_biases(model, biases, bias, beside, path / WEIGHTS_NAME)
    from_original = read_metadata(path / WEIGHTS_NAME).get(_FROM_ORIGINAL) == "True"
    found: dict[int, Adapter] = {}
    changes: dict[int, BaseChange | None] = {}
    for module, tensors in adapters.items():
        layer = _find_layer(layers, module, path / WEIGHTS_NAME)
        try:
            if not all(t.float().isfinite().all() for t in tensors.values()):
                raise ValueError("expected finite values, got NaN or an infinity")
            adapter = kind.from_file(layer_base(layer), config, module, tensors)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {module}: {error}") from error
        change = None
        if isinstance(adapter, LoRA) and config.get("init_lora_weights") == "pissa":
            change = BaseChange("pissa", adapter.r, from_original, name)
        changes[id(layer)] = change
        _check_place(layer, module, name, beside, change, path / CONFIG_NAME)
        known = found.setdefault(id(layer), adapter).tensors()
        if not all(torch.equal(known[part], t) for part, t in adapter.tensors().items()):
            raise ValueError(
                f"{path / WEIGHTS_NAME}: {module}: expected the tensors of the layer's other name, "
                "got different ones"
            )
    _check_left(layers, found, beside, path / WEIGHTS_NAME)
    root = layers.get("")
    if root is not None and not (id(root) in found and _takes(root, name, found[id(root)], beside)):
        raise ValueError(
            "model: expected a model that holds the layers, or one layer with an adapter of the "
            f"file's kind and rank; a {type(root).__name__} alone cannot be replaced in place"
        )
    convert = _converter(layers, found, changes, original, name, beside)
    replace_layers(model, layers, convert)
    call_layers(model)
    freeze_base(model)
    set_adapter(model, name)
    train_biases(model, bias if not beside else "none")
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)
    tell_hosts(model)


def _converter(
    layers: Mapping[str, nn.Module],
    found: Mapping[int, Adapter],
    changes: Mapping[int, BaseChange | None],
    original: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None,
    adapter_name: str,
    beside: bool,
) -> Callable[[nn.Module], nn.Module]:
    """Return what makes of a layer the one with its adapter of a file.

    Raises:
        TypeError, ValueError, FileNotFoundError: a base is to be changed as a start did, and
            original is not what that needs.
    """
    fresh = {
        _file_name(n): m
        for n, m in layers.items()
        if changes.get(id(m)) is not None
        and isinstance(m, LinearNF4)
        and not isinstance(m, AdaptedLayer)
    }
    names = {id(layer): n for n, layer in fresh.items()}
    from_original = any(c.from_original for c in changes.values() if c is not None)
    source = dense_source(original, fresh, needed=True) if fresh and from_original else None

    def convert(layer: nn.Module) -> nn.Module:
        adapter, change = found.get(id(layer)), changes.get(id(layer))
        if adapter is None:
            return layer if beside or not isinstance(layer, AdaptedLayer) else layer.to_base()
        module = names.get(id(layer))
        if module is not None and change is not None and isinstance(adapter, LoRA):
            dense = None if source is None else source(module)
            base: Any = layer
            start = initialize(change.kind, base.weight, dense, change.r, adapter.scaling)
            layer = LinearNF4.from_weight(start.q, base.bias).take_after(base)
        adapted = _put_on(layer, adapter_name, adapter, beside)
        adapted.base_change = change or adapted.base_change
        return adapted

    return convert


def _takes(layer: nn.Module, name: str, adapter: Adapter, beside: bool) -> bool:
    """Return whether a layer can have an adapter without being replaced."""
    if not isinstance(layer, AdaptedLayer):
        return False
    held = layer.named_adapters()
    return beside or (list(held) == [name] and held[name].fits(adapter))


def _put_on(layer: nn.Module, name: str, adapter: Adapter, beside: bool) -> AdaptedLayer:
    """Return a layer with an adapter of a file.

    Args:
        layer: a linear layer; itself is returned if it can take the adapter, or its values.
        name: of the adapter.
        adapter: new.
        beside: whether the layer keeps the adapters it has.
    """
    if not isinstance(layer, AdaptedLayer) or (beside and _takes(layer, name, adapter, beside)):
        return with_adapter(layer, name, adapter)
    if _takes(layer, name, adapter, beside):
        layer.named_adapters()[name].take(adapter)
        return layer
    adapted = with_adapter(layer.to_base(), name, adapter)
    adapted.base_change = layer.base_change
    return adapted


def _check_kind(model: nn.Module, kind: type[Adapter], file: Path) -> None:
    """Raise ValueError if a model has adapters of another kind than a file that would replace them.

    Whoever wants another kind gives it a name, or a model without adapters.
    """
    for layer in adapted_layers(model):
        for name, adapter in layer.named_adapters().items():
            if not isinstance(adapter, kind):
                raise ValueError(
                    f"{file}: expected peft_type {adapter.peft_type!r} like the model's adapter "
                    f"{name!r}, got {kind.peft_type!r}; give it an adapter_name to have both"
                )


def _check_left(
    layers: Mapping[str, nn.Module], found: Mapping[int, Adapter], beside: bool, file: Path
) -> None:
    """Raise ValueError if an adapter that has changed its base would be lost."""
    for module, layer in layers.items():
        change = layer.base_change if isinstance(layer, AdaptedLayer) else None
        if change is not None and id(layer) not in found and not beside:
            raise ValueError(
                f"{file}: expected an adapter of {module}, whose base was {change}, found none"
            )


def _find_biases(
    model: nn.Module, biases: dict[str, Tensor], bias: str, beside: bool, file: Path
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the parameters that a file's biases go to; layers may change, their biases stay."""
    if beside and bias != "none":
        raise ValueError(f"{file}: expected bias='none' beside other adapters, got {bias!r}")
    if biases and bias == "none":
        raise ValueError(f"{file}: expected no bias with bias='none', got {next(iter(biases))!r}")
    known = {_file_name(n): p for n, p in model.named_parameters() if n.endswith("bias")}
    found = []
    for name, value in biases.items():
        parameter = known.get(name.replace(".base_layer.bias", ".bias"))
        if parameter is None or parameter.shape != value.shape or not value.isfinite().all():
            shape = None if parameter is None else tuple(parameter.shape)
            raise ValueError(
                f"{file}: {name}: expected the bias of a layer of this model, of shape {shape} and "
                f"finite, got {tuple(value.shape)}"
            )
        found.append((parameter, value))
    return found


def adapter_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, Adapter]:
    """Return one adapter's layers by the name they have in files, each once.

    Raises:
        ValueError: there is no adapter of that name, or no name was given and there are several.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    if not layers:
        raise ValueError("model: expected layers with adapters (nf4.add_lora, …), found none")
    known = adapter_names(model)
    active = {name for layer in layers.values() for name in layer.active_adapters}
    choices = [adapter_name] if adapter_name is not None else sorted(active) or known
    if len(choices) != 1 or choices[0] not in known:
        raise ValueError(f"adapter_name: expected one of {', '.join(known)}, got {adapter_name!r}")
    return {
        _file_name(n): m.named_adapters()[choices[0]]
        for n, m in layers.items()
        if choices[0] in m.named_adapters()
    }


def _file_name(name: str) -> str:
    """Return a module's name without the parts that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _find_layer(layers: Mapping[str, nn.Module], name: str, file: Path) -> nn.Module:
    for module, layer in layers.items():
        if _file_name(module) == name:
            if layer_base(layer).weight.device.type == "meta":
                raise ValueError(f"{name}: expected a layer with values, got one on meta")
            return layer
    raise ValueError(
        f"{file}: expected adapters of linear layers of this model, "
        f"got one of {name!r}, which it does not have"
    )


def _check_place(
    layer: nn.Module,
    module: str,
    name: str,
    beside: bool,
    change: BaseChange | None,
    file: Path,
) -> None:
    """Raise unless an adapter can be put on a layer with its base as it is."""
    if change is not None and not isinstance(layer, LinearNF4):
        raise ValueError(
            f"{file}: {module}: expected a LinearNF4 for an adapter that started by "
            f"{change.kind}, got {type(layer).__name__}"
        )
    if not isinstance(layer, AdaptedLayer):
        return
    if beside and name in layer.named_adapters():
        raise ValueError(f"{file}: {module}: expected a layer without adapter {name!r}, it has one")
    of_layer, of_file = (_form(c) for c in (layer.base_change, change))
    if of_layer != of_file:
        raise ValueError(
            f"{file}: {module}: expected a base {_changed(change)}, on which the adapter of the "
            f"file was trained, got one {_changed(layer.base_change)}"
        )


def _form(change: BaseChange | None) -> tuple[str, int, bool] | None:
    return None if change is None else (change.kind, change.r, change.from_original)


def _changed(change: BaseChange | None) -> str:
    return "as nf4.quantize_model makes it" if change is None else str(change)


def _base_changes(model: nn.Module, layers: dict[str, Adapter]) -> BaseChange | None:
    """Return what changed the base for an adapter; raise unless a file can say so."""
    modules = dict(model.named_modules())
    bases = {_file_name(n): m for n, m in modules.items() if isinstance(m, AdaptedLayer)}
    found = {name: bases[name].base_change for name in layers}
    for name, layer in layers.items():
        change = found[name]
        if change is not None and bases[name].named_adapters()[change.adapter_name] is not layer:
            raise ValueError(
                f"{name}: expected the adapter {change.adapter_name!r} to save, whose start changed"
                " the base: another would need that base in its file too; merge instead"
            )
    kinds = {None if c is None else (c.kind, c.from_original) for c in found.values()}
    if len(kinds) > 1:
        raise ValueError("model: expected one kind of start for all layers, got pissa and another")
    return next(iter(found.values()))


def _adapter_config(model: nn.Module, layers: dict[str, Adapter]) -> dict[str, Any]:
    kinds = {type(adapter).peft_type for adapter in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"model: expected one kind of adapter by that name, got {sorted(kinds)}")
    kind = KINDS[kinds.pop()]
    base = getattr(model, "name_or_path", None)
    return {
        "peft_type": kind.peft_type,
        "task_type": None,
        "base_model_name_or_path": base if isinstance(base, str) and base else None,
        **kind.config_of(layers),
        "target_modules": _targets(model, layers),
        **(_trained_biases(model) if kind.trains_biases else {}),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _targets(model: nn.Module, layers: Mapping[str, Any]) -> list[str] | str:
    names = [_file_name(name) for name, _ in model.named_modules()]
    return shortest_targets(names, set(layers))


def _trained_biases(model: nn.Module) -> dict[str, str]:
    found = {layer.trained_biases for layer in adapted_layers(model)}
    if len(found) > 1:
        raise ValueError(f"bias: expected one value for all adapters, got {found}")
    return {"bias": found.pop()}
