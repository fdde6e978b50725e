"""Files: PEFT's LoRA adapters, written and read.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``; the tensors
are called ``base_model.model.<module>.lora_A.weight`` ``[r, in]``, ``.lora_B.weight`` ``[out, r]``
and, with DoRA, ``.lora_magnitude_vector`` ``[out]``. Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nf4.adapters import (
    adapter_names,
    biases_of,
    freeze_base,
    match_names,
    set_adapter,
    train_biases,
)
from nf4.convert import check_model, check_no_peft, quantized_layers, replace_layers
from nf4.files import check_new, new_folder
from nf4.initialize import dense_source, initialize
from nf4.linear import (
    BaseChange,
    LinearNF4,
    LoRA,
    QLoRALinear,
    check_adapter_name,
    check_lora_options,
    lora_scaling,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Of a file's metadata: whether a start took the weights before quantization
_FROM_ORIGINAL = "nf4_from_original"
_KEY = re.compile(
    re.escape(_PREFIX)
    + r"(?:(?P<module>.*)\.)?(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)"
)
# Options of PEFT that change what the tensors mean, with the values that do not; an option in
# neither list must be empty, for it may be one that came after this was written.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "bias": ("none", "lora_only", "all"),
    "use_rslora": (False, True, None),
    "use_dora": (False, True, None),
    # pissa, olora and their like train against a base weight they have changed; see _check_place
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "pissa"),
}
_HARMLESS = frozenset(
    [
        "task_type",
        "auto_mapping",
        "peft_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    ]
)


@dataclass(frozen=True)
class _Adapter:
    """One layer's adapter as read from a file."""

    lora_A: Tensor
    lora_B: Tensor
    lora_magnitude: Tensor | None
    options: dict[str, Any]  # of `LoRA`

    def fits(self, layer: LinearNF4, name: str) -> bool:
        """Return whether the layer's only adapter has this name, rank and kind."""
        if not isinstance(layer, QLoRALinear) or list(layer.named_adapters()) != [name]:
            return False
        return (layer.r, layer.use_dora) == (self.options["r"], self.options["use_dora"])

    def put_on(self, layer: LinearNF4, name: str, beside: bool) -> QLoRALinear:
        """Return the layer with this adapter.

        Args:
            layer: the layer, itself if it can take the tensors.
            name: of the adapter.
            beside: whether the layer keeps the adapters it has.
        """
        if isinstance(layer, QLoRALinear) and beside:
            layer.add_adapter(name, LoRA.of(layer.weight, **self.options))
            adapted, adapter = layer, layer.named_adapters()[name]
        elif isinstance(layer, QLoRALinear) and self.fits(layer, name):
            layer._set_options(**self.options)
            adapted = adapter = layer
        else:
            adapted = adapter = QLoRALinear.from_weight(
                layer.weight, layer.bias, adapter_name=name, **self.options
            ).take_after(layer)
            if isinstance(layer, QLoRALinear):
                adapted.base_change = layer.base_change
        with torch.no_grad():
            adapter.lora_A.copy_(self.lora_A)
            adapter.lora_B.copy_(self.lora_B)
            if adapter.lora_magnitude is not None and self.lora_magnitude is not None:
                adapter.lora_magnitude.copy_(self.lora_magnitude)
        return adapted


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write a model's adapter in PEFT's files.

    Names are those of the model itself, without what torch.compile and DistributedDataParallel wrap
    around it.

    Args:
        model: a module with `QLoRALinear` layers.
        path: folder to make; it must not exist. It appears only once it is complete.
        adapter_name: which adapter; by default the active one, or the only one.

    Raises:
        FileExistsError: path exists.
        TypeError: model is no module.
        ValueError: the model has no adapter of that name, several of which none was named, adapters
            on meta, adapters that PEFT's one config cannot describe, or a base that another
            adapter's start has changed.
    """
    check_model(model)
    check_no_peft(model)
    path = check_new(path, "path")
    model = _unwrapped(model)
    layers = adapter_layers(model, adapter_name)
    config = _adapter_config(model, layers)
    changes = _base_changes(model, layers)
    tensors = {}
    for name, layer in layers.items():
        if layer.lora_A.is_meta:
            raise ValueError(f"{name}: expected an adapter with values, got one on meta")
        if not all(p.isfinite().all() for p in layer.parameters_of_adapter()):
            raise ValueError(f"{name}: expected an adapter of finite values to save, got others")
        parts = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
        if layer.lora_magnitude is not None:
            parts["lora_magnitude_vector"] = layer.lora_magnitude
        for part, tensor in parts.items():
            key = f"{name}.{part}" if name else part
            tensors[_PREFIX + key] = tensor.detach().cpu().contiguous()
    for name, parameter in biases_of(model, config["bias"]).items():
        module = _file_name(name.rpartition(".")[0])
        key = f"{module}.base_layer.bias" if module in layers else _file_name(name)
        tensors[_PREFIX + key] = parameter.detach().cpu().contiguous()
    with new_folder(path) as folder:
        metadata = {"format": "pt"}
        if changes is not None:
            config["init_lora_weights"] = changes.kind
            metadata[_FROM_ORIGINAL] = str(changes.from_original)
        save_file(tensors, folder / WEIGHTS_NAME, metadata=metadata)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str | None = None,
    original: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
) -> None:
    """Put an adapter saved by `save_adapter` or by PEFT on a quantized model.

    Without a name the model has exactly the adapter of the file afterwards, called "default";
    with one, it is put beside those that are there. It is active and trainable, all else is frozen.
    An adapter that started by PiSSA changes the base as that start did, from the same weights.

    Args:
        model: a module with `LinearNF4` or `QLoRALinear` layers; changed in place, and only after
            the whole file has been checked.
        path: folder with PEFT's two files.
        adapter_name: what to call it.
        original: the weights before quantization, see `nf4.add_lora`; needed for an adapter that
            started by PiSSA from them, on a base that is as `nf4.quantize_model` makes it.

    Raises:
        FileNotFoundError: path or one of its two files is missing.
        TypeError: model is no module.
        ValueError: a file is corrupt, is no LoRA or DoRA adapter, or does not fit the model or its
            base, or a layer has an adapter of that name; the message names the file and the tensor.
    """
    path, beside = Path(path), adapter_name is not None
    name = "default" if adapter_name is None else adapter_name
    check_model(model)
    check_no_peft(model)
    check_adapter_name(name)
    model = _unwrapped(model)
    config = _read_config(path / CONFIG_NAME)
    adapters, biases = _read_tensors(path / WEIGHTS_NAME)
    layers = quantized_layers(model)
    bias = config.get("bias") or "none"
    values = _find_biases(model, biases, bias, beside, path / WEIGHTS_NAME)
    pissa = config.get("init_lora_weights") == "pissa"
    from_original = _metadata(path / WEIGHTS_NAME).get(_FROM_ORIGINAL) == "True"
    found: dict[int, _Adapter] = {}
    changes: dict[int, BaseChange | None] = {}
    for module, tensors in adapters.items():
        layer = _find_layer(layers, module, path / WEIGHTS_NAME)
        _check_tensors(layer, module, tensors, path / WEIGHTS_NAME)
        adapter = _make_adapter(config, module, tensors, path / CONFIG_NAME)
        r = adapter.options["r"]
        changes[id(layer)] = BaseChange("pissa", r, from_original, name) if pissa else None
        _check_place(layer, module, name, beside, changes[id(layer)], path / CONFIG_NAME)
        known = found.setdefault(id(layer), adapter)
        if not all(
            torch.equal(getattr(known, key), getattr(adapter, key)) for key in ("lora_A", "lora_B")
        ):
            raise ValueError(
                f"{path / WEIGHTS_NAME}: {module}: expected the tensors of the layer's other name, "
                "got different ones"
            )
    for module, layer in layers.items():
        changed = isinstance(layer, QLoRALinear) and layer.base_change is not None
        if changed and id(layer) not in found and not beside:
            raise ValueError(
                f"{path / WEIGHTS_NAME}: expected an adapter of {module}, whose base was "
                f"{layer.base_change}, found none"
            )
    fresh = {
        _file_name(n): m
        for n, m in layers.items()
        if pissa and not isinstance(m, QLoRALinear) and id(m) in found
    }
    names = {id(layer): n for n, layer in fresh.items()}
    source = dense_source(original, fresh, needed=True) if fresh and from_original else None

    def convert(layer: LinearNF4) -> LinearNF4:
        adapter = found.get(id(layer))
        if adapter is None:
            return layer if beside or not isinstance(layer, QLoRALinear) else layer.to_base()
        module, change = names.get(id(layer)), changes[id(layer)]
        if module is not None:
            dense = None if source is None else source(module)
            r, alpha, rslora = (adapter.options[o] for o in ("r", "lora_alpha", "use_rslora"))
            start = initialize("pissa", layer.weight, dense, r, lora_scaling(r, alpha, rslora))
            layer = LinearNF4.from_weight(start.q, layer.bias).take_after(layer)
        adapted = adapter.put_on(layer, name, beside)
        adapted.base_change = change or adapted.base_change
        return adapted

    root = layers.get("")
    if root is not None and (
        id(root) not in found
        or not (found[id(root)].fits(root, name) or (beside and isinstance(root, QLoRALinear)))
    ):
        raise ValueError(
            "model: expected a model that holds the layers, or one QLoRALinear of the file's rank; "
            f"a {type(root).__name__} alone cannot be replaced in place"
        )
    replace_layers(model, layers, convert)
    freeze_base(model)
    set_adapter(model, name)
    train_biases(model, bias if not beside else "none")
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)


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


def adapter_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, LoRA]:
    """Return one adapter's layers by the name they have in files, each once.

    Raises:
        ValueError: there is no adapter of that name, or no name was given and there are several.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QLoRALinear)}
    if not layers:
        raise ValueError("model: expected QLoRALinear layers (nf4.add_lora makes them), found none")
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


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _file_name(name: str) -> str:
    """Return a module's name without the parts that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _find_layer(layers: dict[str, LinearNF4], name: str, file: Path) -> LinearNF4:
    for module, layer in layers.items():
        if _file_name(module) == name:
            if layer.packed.is_meta:
                raise ValueError(f"{name}: expected a layer with values, got one on meta")
            return layer
    raise ValueError(
        f"{file}: expected adapters of LinearNF4 layers of this model, "
        f"got one of {name!r}, which it does not have"
    )


def _check_tensors(layer: LinearNF4, name: str, tensors: dict[str, Tensor], file: Path) -> None:
    r = tensors["lora_A.weight"].shape[0]
    expected = {"lora_A.weight": (r, layer.in_features), "lora_B.weight": (layer.out_features, r)}
    found = {part: tuple(tensors[part].shape) for part in expected}
    if found != expected or r < 1:
        a, b = found.values()
        raise ValueError(
            f"{file}: {name}: expected lora_A and lora_B of shapes (r, {layer.in_features}) and "
            f"({layer.out_features}, r) with r ≥ 1, got {a} and {b}"
        )
    magnitude = tensors.get("lora_magnitude_vector")
    if magnitude is not None and tuple(magnitude.shape) != (layer.out_features,):
        raise ValueError(
            f"{file}: {name}: expected lora_magnitude_vector of shape ({layer.out_features},), "
            f"got {tuple(magnitude.shape)}"
        )
    if not all(t.float().isfinite().all() for t in tensors.values()):
        raise ValueError(f"{file}: {name}: expected finite values, got NaN or an infinity")


def _check_place(
    layer: LinearNF4,
    module: str,
    name: str,
    beside: bool,
    change: BaseChange | None,
    file: Path,
) -> None:
    """Raise unless an adapter can be put on a layer with its base as it is."""
    if not isinstance(layer, QLoRALinear):
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


def _base_changes(model: nn.Module, layers: dict[str, LoRA]) -> BaseChange | None:
    """Return what changed the base for an adapter; raise unless a file can say so."""
    modules = dict(model.named_modules())
    bases = {_file_name(n): m for n, m in modules.items() if isinstance(m, QLoRALinear)}
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


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def _make_adapter(
    config: dict[str, Any], name: str, tensors: dict[str, Tensor], file: Path
) -> _Adapter:
    r, alpha = (
        _by_pattern(config, pattern, name, config[default], file)
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    options = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "use_rslora": config.get("use_rslora") or False,
        "use_dora": config.get("use_dora") or False,
    }
    try:
        check_lora_options(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {name}: {error}") from error
    a, b, magnitude = (
        tensors.get(key) for key in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    assert a is not None and b is not None
    if r != a.shape[0]:
        raise ValueError(f"{file}: {name}: expected tensors of rank {r}, got {len(a)}")
    if (magnitude is not None) != options["use_dora"]:
        what = "no lora_magnitude_vector" if magnitude is None else "a lora_magnitude_vector"
        raise ValueError(
            f"{file}: {name}: expected what use_dora={options['use_dora']} needs, got {what}"
        )
    return _Adapter(a, b, magnitude, options)


def _by_pattern(config: dict[str, Any], option: str, name: str, default: Any, file: Path) -> Any:
    """Return PEFT's value for a module: that of the first pattern that matches its name's end."""
    patterns = config.get(option) or {}
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
    except (AttributeError, re.error) as error:
        raise ValueError(
            f"{file}: {option}: expected regular expressions and values, got {patterns!r}: {error}"
        ) from error
    return default


def _adapter_config(model: nn.Module, layers: dict[str, LoRA]) -> dict[str, Any]:
    for option in ("lora_dropout", "use_rslora", "use_dora"):
        values = {getattr(layer, option) for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(f"{option}: expected one value for all adapters, got {values}")
    first = next(iter(layers.values()))
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.lora_alpha for layer in layers.values()).most_common(1)[0][0]
    exact = {name: f"^{re.escape(name)}" for name in layers}
    base = getattr(model, "name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base if isinstance(base, str) and base else None,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "use_dora": first.use_dora,
        "target_modules": _target_modules(model, layers),
        "rank_pattern": {exact[n]: m.r for n, m in layers.items() if m.r != r},
        "alpha_pattern": {
            exact[n]: m.lora_alpha for n, m in layers.items() if m.lora_alpha != alpha
        },
        "bias": _trained_biases(model),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _trained_biases(model: nn.Module) -> str:
    found = {m.trained_biases for m in model.modules() if isinstance(m, QLoRALinear)}
    if len(found) > 1:
        raise ValueError(f"bias: expected one value for all adapters, got {found}")
    return found.pop()


def _target_modules(model: nn.Module, layers: dict[str, LoRA]) -> list[str] | str:
    """Return the shortest form of PEFT's target_modules that names these layers and no others."""
    names = [_file_name(name) for name, _ in model.named_modules()]
    lists = (sorted({name.rpartition(".")[2] for name in layers}), sorted(layers))
    for targets in lists:
        if match_names(names, targets) == set(layers):
            return targets
    return "|".join(re.escape(name) for name in sorted(layers))


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"path: expected a folder with {CONFIG_NAME}, {file} does not exist"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file}: expected peft_type 'LORA', got {found!r}")
    for option, value in config.items():
        plain = option in _HARMLESS or (
            value in _PLAIN_LORA[option] if option in _PLAIN_LORA else not value
        )
        if not plain:
            raise ValueError(f"{file}: expected a plain LoRA adapter, got {option}={value!r}")
    options: list[Any] = [config.get(name) for name in ("r", "lora_alpha")]
    options += [config.get("lora_dropout", 0.0)]
    try:
        check_lora_options(*options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def _read_tensors(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return adapters' tensors by module and by the end of their name, and biases by name."""
    if not file.is_file():
        raise FileNotFoundError(
            f"path: expected a folder with {WEIGHTS_NAME}, {file} does not exist"
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got {error}") from error
    modules: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(_PREFIX) and key.endswith(".bias") and tensor.ndim == 1:
            biases[key.removeprefix(_PREFIX)] = tensor
            continue
        match = _KEY.fullmatch(key)
        dims = 1 if match is not None and match["part"] == "lora_magnitude_vector" else 2
        if match is None or tensor.ndim != dims or not tensor.is_floating_point():
            raise ValueError(
                f"{file}: expected matrices called {_PREFIX}<module>.lora_A.weight or "
                f".lora_B.weight, and vectors .lora_magnitude_vector, got {key!r}, {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        modules.setdefault(match["module"] or "", {})[match["part"]] = tensor
    for name, parts in modules.items():
        if not {"lora_A.weight", "lora_B.weight"} <= parts.keys():
            raise ValueError(f"{file}: {name}: expected lora_A and lora_B, got only one of them")
    if not modules:
        raise ValueError(f"{file}: expected lora_A and lora_B tensors, got none")
    return modules, biases
