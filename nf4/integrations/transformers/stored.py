"""Look at a checkpoint's files before a model is filled from them, and say what does not fit."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from nf4.layers.experts import PARTS as EXPERT_PARTS
from nf4.layers.experts import with_expert_names
from nf4.layers.module import QuantizedModule
from nf4.tensor import PARTS
from nf4.tools.shards import Shards

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
        for name, held in Shards.header(file.parent, file.name).items():
            found[name] = Stored(file, held.shape, held.dtype)
    return found


def is_part(name: str) -> bool:
    """Return whether a tensor's name is that of a part of a 4-bit weight."""
    return name.rpartition(".")[2] in PARTS


def ignore_marks(stored: dict[str, Stored], model: Any) -> None:
    """Pass over what stands in files for dense weights that are in four bits there.

    Args:
        stored: what files hold; marks are taken out.
        model: transformers is told to expect them.
    """
    marks = [n for n, t in stored.items() if n.endswith(".weight") and (t.shape, t.dtype) == _MARK]
    if not marks:
        return
    for name in marks:
        del stored[name]
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    names = {f"{re.escape(name)}$" for name in model_names(marks, model).values()}
    model._keys_to_ignore_on_load_unexpected = {*known, *names}


_MARK = ((0,), "U8")


def names_in_model(stored: Mapping[str, Stored], model: Any) -> dict[str, Stored]:
    """Return what files hold, parts of 4-bit weights by the names that the model has for them."""
    renamed = model_names((name for name in stored if is_part(name)), model)
    return {renamed.get(name, name): tensor for name, tensor in stored.items()}


def model_names(names: Iterable[str], model: Any) -> dict[str, str]:
    """Return the names that a model has for tensors, by their names in files.

    transformers renames tensors of some architectures, and the part of the model below its head
    has a prefix in some files and in others not.
    """
    renamings = [
        c for c in get_model_conversion_mapping(model) if not isinstance(c, WeightConverter)
    ]
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = getattr(model, "base_model_prefix", "")
    found = {}
    for name in names:
        renamed = with_expert_names(name)
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        candidates = [*_names(renamed, prefix), *_names(with_expert_names(name), prefix)]
        found[name] = next((n for n in candidates if _module(n) in modules), candidates[0])
    return found


def check_stored(stored: Mapping[str, Stored], model: Any, tied: Iterable[str]) -> None:
    """Raise unless files hold each part of each quantized weight, in its form, and no other.

    Args:
        stored: what the files hold, by the model's names.
        model: whose layers are quantized already, on meta.
        tied: names of parts that are another's, and need not be stored.

    Raises:
        ValueError: a part is missing, has another form, or belongs to no quantized layer; the
            message names the tensor and the file.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    files = ", ".join(sorted({str(tensor.file) for tensor in stored.values()}))
    known = set(tied)
    for name, layer in layers.items():
        for part, tensor in zip(PARTS, layer.weight.parts(), strict=True):
            key = f"{name}.{part}"
            found = stored.get(key)
            if tensor is None and found is not None:
                raise ValueError(
                    f"{found.file}: {key}: expected none (double_quant=False), got one"
                )
            if tensor is None or (found is None and key in known):
                continue
            if found is None:
                raise ValueError(f"{key}: expected this tensor in {files}, found none")
            expected = (tuple(tensor.shape), _DTYPES[str(tensor.dtype)])
            if (found.shape, found.dtype) != expected:
                raise ValueError(
                    f"{found.file}: {key}: expected {expected[1]} {expected[0]} (block_size="
                    f"{layer.block_size}, double_quant={layer.double_quant}), "
                    f"got {found.dtype} {found.shape}"
                )
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, one in stored.items():
        module = modules.get(key.rpartition(".")[0])
        if key.endswith(".packed") and not isinstance(module, QuantizedModule | None):
            raise ValueError(
                f"{one.file}: {key}: expected weights of layers that nf4 quantizes, "
                f"got one of a {type(module).__name__}"
            )


def forms_in_model(forms: Mapping[str, Sequence[Any]], model: Any) -> dict[str, tuple[int, bool]]:
    """Return block sizes and double quantization by the names that the model has for layers."""
    names = model_names((f"{name}.packed" for name in forms), model)
    found = {name: names[f"{name}.packed"].removesuffix(".packed") for name in forms}
    return {found[name]: (form[0], form[1]) for name, form in forms.items()}


def _module(name: str) -> str:
    """Return the name of the module of a tensor; of an expert's, that of the dense experts."""
    module = name.rpartition(".")[0]
    part = module.rpartition(".")[0]
    if part.rpartition(".")[2] in EXPERT_PARTS:
        return part.rpartition(".")[0]
    return module


def _names(key: str, prefix: str) -> list[str]:
    """Return the names a tensor may have in files, which may be of the model with another head."""
    if not prefix:
        return [key]
    return [key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")]
