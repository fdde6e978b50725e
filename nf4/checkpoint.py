"""Files: PEFT's LoRA adapters, written and read.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``; the tensors
are called ``base_model.model.<module>.lora_A.weight`` ``[r, in]`` and ``.lora_B.weight``
``[out, r]``. Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nf4.convert import freeze_base, quantized_layers
from nf4.files import check_new, new_folder
from nf4.linear import LinearNF4, QLoRALinear, check_lora_options

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?:(?P<module>.*)\.)?lora_(?P<side>[AB])\.weight")
# Options of PEFT that change what the tensors mean; any other value than these is refused.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's adapters in PEFT's files.

    Args:
        model: a module with `QLoRALinear` layers.
        path: folder to make; it must not exist. It appears only once it is complete.

    Raises:
        FileExistsError: path exists.
        TypeError: model is no module.
        ValueError: the model has no adapter, or adapters that PEFT's one config cannot describe.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    path = check_new(path, "path")
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("model: expected QLoRALinear layers (nf4.add_lora makes them), found none")
    config = _adapter_config(model, layers)
    tensors = {}
    for name, layer in layers.items():
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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    config = _read_config(path / CONFIG_NAME)
    adapters = _read_tensors(path / WEIGHTS_NAME)
    layers = quantized_layers(model)
    for name, (lora_A, lora_B) in adapters.items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(
                f"{path / WEIGHTS_NAME}: expected adapters of LinearNF4 layers of this model, "
                f"got one of {name!r}, which it does not have"
            )
        r = lora_A.shape[0]
        expected = ((r, layer.in_features), (layer.out_features, r))
        if (tuple(lora_A.shape), tuple(lora_B.shape)) != expected:
            raise ValueError(
                f"{path / WEIGHTS_NAME}: {name}: expected lora_A and lora_B of shapes "
                f"{expected[0]} and {expected[1]}, got {tuple(lora_A.shape)} and "
                f"{tuple(lora_B.shape)}"
            )
    freeze_base(model)
    for name, old in layers.items():
        if name in adapters:
            _set_adapter(model, name, old, config, *adapters[name])
        elif isinstance(old, QLoRALinear):
            model.set_submodule(name, old.to_base())


def adapter_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """Return the `QLoRALinear` layers of a model by name, each layer once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QLoRALinear)}


def _adapter_config(model: nn.Module, layers: dict[str, QLoRALinear]) -> dict[str, Any]:
    for option in ("lora_dropout", "use_rslora"):
        values = {getattr(layer, option) for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(f"{option}: expected one value for all adapters, got {values}")
    first = next(iter(layers.values()))
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.lora_alpha for layer in layers.values()).most_common(1)[0][0]
    names = {name: f"^{re.escape(name)}" for name in layers}
    base = getattr(model, "name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base if isinstance(base, str) and base else None,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "target_modules": sorted(layers),
        "rank_pattern": {names[n]: m.r for n, m in layers.items() if m.r != r},
        "alpha_pattern": {
            names[n]: m.lora_alpha for n, m in layers.items() if m.lora_alpha != alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


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
    for option, plain in _PLAIN_LORA.items():
        if option in config and config[option] not in plain:
            raise ValueError(
                f"{file}: expected a plain LoRA adapter, got {option}={config[option]!r}"
            )
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


def _set_adapter(
    model: nn.Module,
    name: str,
    old: LinearNF4,
    config: dict[str, Any],
    lora_A: Tensor,
    lora_B: Tensor,
) -> None:
    """Give the layer called `name` this adapter; a `QLoRALinear` of its rank stays the object."""
    r = lora_A.shape[0]
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next(
        (a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", name)),
        config["lora_alpha"],
    )
    options = {
        "lora_alpha": alpha,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "use_rslora": bool(config.get("use_rslora")),
    }
    if isinstance(old, QLoRALinear) and old.r == r:
        layer = old
        layer.lora_alpha, layer.lora_dropout = options["lora_alpha"], options["lora_dropout"]
        layer.use_rslora = options["use_rslora"]
    else:
        layer = QLoRALinear.from_weight(old.weight, old.bias, r=r, **options).train(old.training)
        model.set_submodule(name, layer)
    with torch.no_grad():
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    layer.lora_A.requires_grad_(True)
    layer.lora_B.requires_grad_(True)
