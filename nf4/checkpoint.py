"""Files: PEFT's LoRA adapters, written and read.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``; the tensors
are called ``base_model.model.<module>.lora_A.weight`` ``[r, in]`` and ``.lora_B.weight``
``[out, r]``. Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nf4.convert import (
    check_model,
    freeze_base,
    match_names,
    quantized_layers,
    replace_layers,
)
from nf4.files import check_new, new_folder
from nf4.linear import LinearNF4, QLoRALinear, check_lora_options

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?:(?P<module>.*)\.)?lora_(?P<side>[AB])\.weight")
# Options of PEFT that change what the tensors mean, with the values that do not; an option in
# neither list must be empty, for it may be one that came after this was written.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_rslora": (False, True, None),
    # pissa, olora and their like train against a base weight they have changed
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
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
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool

    def fits(self, layer: LinearNF4) -> bool:
        """Return whether the layer has an adapter of this rank, whose tensors can take it."""
        return isinstance(layer, QLoRALinear) and layer.r == self.lora_A.shape[0]

    def put_on(self, layer: LinearNF4) -> QLoRALinear:
        """Return the layer with this adapter: itself if it has one of the same rank."""
        options = {
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
        }
        if isinstance(layer, QLoRALinear) and self.fits(layer):
            adapted = layer
            for name, value in options.items():
                setattr(adapted, name, value)
        else:
            adapted = QLoRALinear.from_weight(
                layer.weight, layer.bias, r=len(self.lora_A), **options
            )
            adapted.train(layer.training)
        with torch.no_grad():
            adapted.lora_A.copy_(self.lora_A)
            adapted.lora_B.copy_(self.lora_B)
        adapted.lora_A.requires_grad_(True)
        adapted.lora_B.requires_grad_(True)
        return adapted


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's adapters in PEFT's files.

    Names are those of the model itself, without what torch.compile and DistributedDataParallel wrap
    around it.

    Args:
        model: a module with `QLoRALinear` layers.
        path: folder to make; it must not exist. It appears only once it is complete.

    Raises:
        FileExistsError: path exists.
        TypeError: model is no module.
        ValueError: the model has no adapter, adapters on meta, or adapters that PEFT's one config
            cannot describe.
    """
    check_model(model)
    path = check_new(path, "path")
    model = _unwrapped(model)
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("model: expected QLoRALinear layers (nf4.add_lora makes them), found none")
    config = _adapter_config(model, layers)
    tensors = {}
    for name, layer in layers.items():
        if layer.lora_A.is_meta:
            raise ValueError(f"{name}: expected an adapter with values, got one on meta")
        for side, tensor in (("A", layer.lora_A), ("B", layer.lora_B)):
            key = ".".join(part for part in (name, f"lora_{side}", "weight") if part)
            tensors[_PREFIX + key] = tensor.detach().cpu().contiguous()
    with new_folder(path) as folder:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put an adapter saved by `save_adapter` or by PEFT on a quantized model.

    Afterwards the model has exactly the adapters of the file, trainable, and all else is frozen.

    Args:
        model: a module with `LinearNF4` or `QLoRALinear` layers; changed in place, and only after
            the whole file has been checked.
        path: folder with PEFT's two files.

    Raises:
        FileNotFoundError: path or one of its two files is missing.
        TypeError: model is no module.
        ValueError: a file is corrupt, is not a plain LoRA adapter, or does not fit the model; the
            message names the file and the tensor.
    """
    path = Path(path)
    check_model(model)
    model = _unwrapped(model)
    config = _read_config(path / CONFIG_NAME)
    adapters = _read_tensors(path / WEIGHTS_NAME)
    layers = quantized_layers(model)
    found: dict[int, _Adapter] = {}
    for name, tensors in adapters.items():
        layer = _find_layer(layers, name, path / WEIGHTS_NAME)
        _check_tensors(layer, name, tensors, path / WEIGHTS_NAME)
        adapter = _make_adapter(config, name, tensors, path / CONFIG_NAME)
        known = found.setdefault(id(layer), adapter)
        if not (torch.equal(known.lora_A, tensors[0]) and torch.equal(known.lora_B, tensors[1])):
            raise ValueError(
                f"{path / WEIGHTS_NAME}: {name}: expected the tensors of the layer's other name, "
                "got different ones"
            )

    def convert(layer: LinearNF4) -> LinearNF4:
        if id(layer) in found:
            return found[id(layer)].put_on(layer)
        return layer.to_base() if isinstance(layer, QLoRALinear) else layer

    root = layers.get("")
    if root is not None and (id(root) not in found or not found[id(root)].fits(root)):
        raise ValueError(
            "model: expected a model that holds the layers, or one QLoRALinear of the file's rank; "
            f"a {type(root).__name__} alone cannot be replaced in place"
        )
    replace_layers(model, layers, convert)
    freeze_base(model)


def adapter_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """Return the `QLoRALinear` layers of a model by the name they have in files, each once."""
    modules = model.named_modules()
    return {_file_name(n): m for n, m in modules if isinstance(m, QLoRALinear)}


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


def _check_tensors(layer: LinearNF4, name: str, tensors: tuple[Tensor, Tensor], file: Path) -> None:
    r = tensors[0].shape[0]
    expected = ((r, layer.in_features), (layer.out_features, r))
    found = tuple(tuple(t.shape) for t in tensors)
    if found != expected or r < 1:
        raise ValueError(
            f"{file}: {name}: expected lora_A and lora_B of shapes (r, {layer.in_features}) and "
            f"({layer.out_features}, r) with r ≥ 1, got {found[0]} and {found[1]}"
        )
    if not all(t.isfinite().all() for t in tensors):
        raise ValueError(f"{file}: {name}: expected finite values, got NaN or an infinity")


def _make_adapter(
    config: dict[str, Any], name: str, tensors: tuple[Tensor, Tensor], file: Path
) -> _Adapter:
    r, alpha = (
        _by_pattern(config, pattern, name, config[default], file)
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    dropout = config.get("lora_dropout", 0.0)
    try:
        check_lora_options(r, alpha, dropout)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {name}: {error}") from error
    if r != tensors[0].shape[0]:
        raise ValueError(f"{file}: {name}: expected tensors of rank {r}, got {len(tensors[0])}")
    return _Adapter(*tensors, alpha, dropout, bool(config.get("use_rslora")))


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


def _adapter_config(model: nn.Module, layers: dict[str, QLoRALinear]) -> dict[str, Any]:
    for option in ("lora_dropout", "use_rslora"):
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
        "target_modules": _target_modules(model, layers),
        "rank_pattern": {exact[n]: m.r for n, m in layers.items() if m.r != r},
        "alpha_pattern": {
            exact[n]: m.lora_alpha for n, m in layers.items() if m.lora_alpha != alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _target_modules(model: nn.Module, layers: dict[str, QLoRALinear]) -> list[str] | str:
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
    options = [config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)]
    try:
        check_lora_options(*options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def _read_tensors(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    if not file.is_file():
        raise FileNotFoundError(
            f"path: expected a folder with {WEIGHTS_NAME}, {file} does not exist"
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got {error}") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{file}: expected matrices called {_PREFIX}<module>.lora_A.weight or "
                f".lora_B.weight, got {key!r}, {tensor.dtype} {tuple(tensor.shape)}"
            )
        sides.setdefault(match["module"] or "", {})[match["side"]] = tensor
    for name, pair in sides.items():
        if len(pair) != 2:
            raise ValueError(f"{file}: {name}: expected lora_A and lora_B, got only one of them")
    if not sides:
        raise ValueError(f"{file}: expected lora_A and lora_B tensors, got none")
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}
