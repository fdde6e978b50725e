"""Save the adapters of a model, of any kind; LoRA and (IA)³ as PEFT's files."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from nf4.adapters.layer import AdaptedLayer, BaseChange, adapted_layers
from nf4.adapters.targets import shortest_targets
from nf4.adapters.term import KINDS, Adapter
from nf4.files.adapters import (
    PREFIX,
    AdapterFiles,
    file_name,
)
from nf4.layers.sharded import company_of
from nf4.models.adapt import (
    adapter_names,
    biases_of,
    unwrapped,
)
from nf4.models.quantize import check_model, check_no_peft
from nf4.tools.paths import check_new, new_folder
from nf4.tools.ranks import whole

# Of a file's metadata: whether a start took the weights before quantization
FROM_ORIGINAL = "nf4_from_original"


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write a model's adapter in PEFT's files.

    Names are those of the model itself, without what torch.compile and DistributedDataParallel wrap
    around it. A mixture of `nf4.add_adamix` is written in a form of our own; PEFT opens what
    `nf4.merge_adamix` makes of it.

    Each process saves a model that is split or sharded, and the first of them writes.

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
        RuntimeError: of a model that is sharded, the first process could not write.
    """
    check_model(model)
    check_no_peft(model)
    path = check_new(path, "path")
    company = company_of(model)
    files = adapter_files(model, adapter_name)
    if not company:
        with new_folder(path) as folder:
            files.write(folder)
        return
    company.agree(True)  # that the folder is not there
    wrote = False
    try:
        if company.writes:
            with new_folder(path) as folder:
                files.write(folder)
        wrote = True
    finally:
        all_fine = company.agree(wrote)
    if not all_fine:
        raise RuntimeError(f"path: expected the first process to write {path}, it could not")


def adapter_files(
    model: nn.Module,
    adapter_name: str | None = None,
    with_base: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> AdapterFiles:
    """Return what is to be written of an adapter, all checked.

    Args:
        model: a module with adapters.
        adapter_name: which adapter; by default the active one, or the only one.
        with_base: whether the base is written beside it, as a start may have changed it, for
            transformers to open both.
        state: of the model, if its values are to be written in place of those that it has; by
            default each process has to ask, if the model is sharded.

    Raises:
        ValueError: as for `save_adapter`.
    """
    model = unwrapped(model)
    values = partial(_value, state or {}, _names(model) if state else {})
    layers = adapter_layers(model, adapter_name)
    config = _adapter_config(model, layers)
    changes = None if with_base else _base_changes(model, layers)
    tensors = {}
    for name, adapter in layers.items():
        if any(t.is_meta for t in adapter.tensors().values()):
            raise ValueError(f"{name}: expected an adapter with values, got one on meta")
        held = {part: values(tensor) for part, tensor in adapter.tensors().items()}
        if not all(tensor.isfinite().all() for tensor in held.values()):
            raise ValueError(f"{name}: expected an adapter of finite values to save, got others")
        others = {part: alias for alias, part in adapter.aliases.items()} if with_base else {}
        for part, tensor in held.items():
            end = others.get(part, part)
            key = f"{name}.{end}" if name else end
            tensors[PREFIX + key] = tensor.cpu().contiguous()
    for name, parameter in biases_of(model, config.get("bias", "none")).items():
        module = file_name(name.rpartition(".")[0])
        key = f"{module}.base_layer.bias" if module in layers else file_name(name)
        tensors[PREFIX + key] = values(parameter).cpu().contiguous()
    metadata = {}
    if changes is not None:
        config["init_lora_weights"] = changes.kind
        metadata[FROM_ORIGINAL] = str(changes.from_original)
    return AdapterFiles(config, tensors, metadata)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}


def _value(state: Mapping[str, Tensor], names: Mapping[int, str], parameter: Tensor) -> Tensor:
    """Return the value of a parameter in a state dict, or else its own, whole."""
    given = state.get(names.get(id(parameter), ""))
    return whole((parameter if given is None else given).detach())


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
        file_name(n): m.named_adapters()[choices[0]]
        for n, m in layers.items()
        if choices[0] in m.named_adapters()
    }


def _base_changes(model: nn.Module, layers: dict[str, Adapter]) -> BaseChange | None:
    """Return what changed the base for an adapter; raise unless a file can say so."""
    modules = dict(model.named_modules())
    bases = {file_name(n): m for n, m in modules.items() if isinstance(m, AdaptedLayer)}
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
    names = [file_name(name) for name, _ in model.named_modules()]
    return shortest_targets(names, set(layers))


def _trained_biases(model: nn.Module) -> dict[str, str]:
    found = {layer.trained_biases for layer in adapted_layers(model)}
    if len(found) > 1:
        raise ValueError(f"bias: expected one value for all adapters, got {found}")
    return {"bias": found.pop()}
