"""The two files of an adapter, read and written.

What goes there nf4/files/checkpoint.py knows, and where what was read goes nf4/files/loading.py.
``adapter_config.json`` holds its options, ``adapter_model.safetensors`` tensors called
``base_model.model.<module>.<part>``; which parts there are is the kind's to say.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

import nf4.models.kinds  # noqa: F401  # so that files of every kind are known
from nf4.adapters.term import KINDS, Adapter
from nf4.tools.paths import beside, save_tensors, write_file
from nf4.tools.shards import read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's two files, read, and right in themselves; what they fit is asked later.

    Attributes:
        folder: where they are.
        config: of ``adapter_config.json``, checked by the kind.
        kind: of the adapter.
        tensors: of each module by the ends of their names.
        biases: by name.
        metadata: what the weights' file says beside its tensors.
    """

    folder: Path
    config: dict[str, Any]
    kind: type[Adapter]
    tensors: dict[str, dict[str, Tensor]]
    biases: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "AdapterFile":
        """Read both files.

        Raises:
            FileNotFoundError: one of them is missing.
            ValueError: one is corrupt, or holds no adapter of a kind known here.
        """
        config, kind = _read_config(folder / CONFIG_NAME)
        file = folder / WEIGHTS_NAME
        return cls(folder, config, kind, *_read_tensors(file, kind), _read_metadata(file))

    @property
    def weights(self) -> Path:
        """The file of tensors, for messages."""
        return self.folder / WEIGHTS_NAME

    @property
    def bias(self) -> str:
        """Which biases train beside the adapter."""
        bias: str = self.config.get("bias") or "none"
        return bias


def file_name(name: str) -> str:
    """Return a module's name without the parts that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


@dataclass(frozen=True)
class AdapterFiles:
    """What is written of one adapter.

    Attributes:
        config: of ``adapter_config.json``.
        tensors: of ``adapter_model.safetensors``, by name.
        metadata: of the latter, beside its format.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write both files into a folder that exists, each whole or not at all."""
        with beside(folder / WEIGHTS_NAME) as file:
            save_tensors(self.tensors, file, self.metadata)
        write_file(folder / CONFIG_NAME, json.dumps(self.config, indent=2) + "\n")


def _read_config(file: Path) -> tuple[dict[str, Any], type[Adapter]]:
    """Return a file's config and the kind of its adapter."""
    if not file.is_file():
        raise FileNotFoundError(
            f"path: expected a folder with {CONFIG_NAME}, {file} does not exist"
        )
    config = read_json(file)
    found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if not isinstance(config, dict) or not isinstance(found, str) or found not in KINDS:
        known = " or ".join(repr(kind) for kind in sorted(KINDS))
        raise ValueError(f"{file}: expected peft_type {known}, got {found!r}")
    kind = KINDS[found]
    try:
        kind.check_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return config, kind


def _read_tensors(
    file: Path, kind: type[Adapter]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return adapters' tensors by module and by the end of their name, and biases by name."""
    if not file.is_file():
        raise FileNotFoundError(
            f"path: expected a folder with {WEIGHTS_NAME}, {file} does not exist"
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got {error}") from error
    ends = "|".join(re.escape(part) for part in (*kind.parts, *kind.aliases))
    pattern = re.compile(rf"{re.escape(PREFIX)}(?:(?P<module>.*)\.)?(?P<part>{ends})")
    modules: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if not match and key.startswith(PREFIX) and key.endswith(".bias") and tensor.ndim == 1:
            biases[key.removeprefix(PREFIX)] = tensor
            continue
        part = "" if match is None else kind.aliases.get(match["part"], match["part"])
        dims = kind.parts.get(part)
        if match is None or tensor.ndim != dims or not tensor.is_floating_point():
            form = ", ".join(f"{p} of {d} dimensions" for p, d in kind.parts.items())
            raise ValueError(
                f"{file}: expected floating tensors called {PREFIX}<module>.<part> with the parts "
                f"{form}, got {key!r}, {tensor.dtype} {tuple(tensor.shape)}"
            )
        modules.setdefault(match["module"] or "", {})[part] = tensor
    if not modules:
        raise ValueError(f"{file}: expected tensors of {kind.peft_type}, got none")
    return modules, biases


def _read_metadata(file: Path) -> dict[str, str]:
    """Return what the weights' file says beside its tensors."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})
