"""Look at a checkpoint's files before a model is filled from them, and say what does not fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from nf4.quantized_module import QuantizedModule
from nf4.tensor import PARTS

_DTYPES = {"torch.uint8": "U8", "torch.float32": "F32"}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and its form; dtype as safetensors call it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(files: Iterable[str] | None) -> dict[str, Stored]:
    """Return what safetensors files hold, by name; other kinds of files are passed over.

    Raises:
        ValueError: a file is truncated or corrupt; the message names it.
    """
    found: dict[str, Stored] = {}
    for file in (Path(f) for f in files or () if str(f).endswith(".safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    view = opened.get_slice(name)
                    found[name] = Stored(file, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file}: expected a whole safetensors file, got {error}") from error
    return found


def check_stored(stored: Mapping[str, Stored], model: Any, tied: Iterable[str]) -> None:
    """Raise unless files hold each part of each quantized weight, in its form, and no other.

    Args:
        stored: what the files hold.
        model: whose layers are quantized already, on meta.
        tied: names of parts that are another's, and need not be stored.

    Raises:
        ValueError: a part is missing, has another form, or belongs to no quantized layer; the
            message names the tensor and the file.
    """
    if not stored:
        return
    prefix = getattr(model, "base_model_prefix", "")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    files = ", ".join(sorted({str(tensor.file) for tensor in stored.values()}))
    known, seen = set(tied), set()
    for name, layer in layers.items():
        for part, tensor in zip(PARTS, layer.weight.parts(), strict=True):
            key = f"{name}.{part}"
            names = [n for n in _names(key, prefix) if n in stored]
            if tensor is None:
                if names:
                    raise ValueError(
                        f"{stored[names[0]].file}: {names[0]}: expected none (double_quant=False), "
                        "got one"
                    )
                continue
            if not names:
                if key in known:
                    continue
                raise ValueError(f"{key}: expected this tensor in {files}, found none")
            seen.add(names[0])
            found = stored[names[0]]
            expected = (tuple(tensor.shape), _DTYPES[str(tensor.dtype)])
            if (found.shape, found.dtype) != expected:
                raise ValueError(
                    f"{found.file}: {names[0]}: expected {expected[1]} {expected[0]} (block_size="
                    f"{layer.block_size}, double_quant={layer.double_quant}), "
                    f"got {found.dtype} {found.shape}"
                )
    for key, one in stored.items():
        module, _, part = key.rpartition(".")
        if part == "packed" and key not in seen and one.dtype == "U8":
            _check_unknown(module, one, model, prefix)


def _check_unknown(module: str, tensor: Stored, model: nn.Module, prefix: str) -> None:
    """Raise if a 4-bit weight belongs to a module of the model that is not quantized."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in _names(module, prefix):
        if name in modules and not isinstance(modules[name], QuantizedModule):
            raise ValueError(
                f"{tensor.file}: {module}.packed: expected weights of layers that nf4 quantizes, "
                f"got one of {name}, a {type(modules[name]).__name__} (skip_modules?)"
            )


def _names(key: str, prefix: str) -> list[str]:
    """Return the names a tensor may have in files, which may be of the model with another head."""
    if not prefix:
        return [key]
    return [key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")]
