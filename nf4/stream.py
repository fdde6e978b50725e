"""Quantize a checkpoint from folder to folder, a weight at a time: the model is never in memory."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nf4.checks import check_block_size, check_scale
from nf4.convert import check_callback, check_skip_modules
from nf4.dense_files import weight_files
from nf4.files import check_new
from nf4.functional import quantize
from nf4.tensor import PARTS

if TYPE_CHECKING:
    from nf4.integrations.transformers.dense_layers import Plan

_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".pt", ".pth", ".onnx", ".ckpt")
_ENDS = 1 << 22  # bytes at either end of a file, its header among them
_MADE_AS = "nf4"  # of a file's metadata: what it was made of, and how


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What `quantize_checkpoint` wrote.

    Attributes:
        layers: how many weights were quantized.
        bytes_before: of all tensors in the source.
        bytes_after: of all tensors written.
    """

    layers: int
    bytes_before: int
    bytes_after: int


def quantize_checkpoint(
    source_dir: str | os.PathLike[str],
    target_dir: str | os.PathLike[str],
    skip_modules: str | Iterable[str] | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    scale: str = "absmax",
    progress: Callable[[int, int], None] | None = None,
) -> QuantizedCheckpoint:
    """Quantize a transformers folder into another, which ``from_pretrained`` opens.

    The bits are those of ``from_pretrained(source_dir, quantization_config=NF4Config(…))``. A file
    is written for each file of the source; memory holds one weight, and what one file becomes.
    Until all is done the files lie in a hidden folder beside the target: call it again after an
    interruption, and it goes on after the last whole file. Experts of a mixture stay dense, and so
    do embeddings. Tokenizers and other files beside the weights are copied, folders are not.

    Args:
        source_dir: folder with ``config.json`` and safetensors.
        target_dir: folder to make.
        skip_modules: names of modules to leave dense, as for `nf4.quantize_model`; by default what
            transformers leaves alone, such as the output layer.
        block_size: elements that share one scale, a power of two from 32 to 4096.
        double_quant: quantize the scales to 8 bits too.
        scale: how scales are found, see `nf4.quantize`.
        progress: called with (files done, files in all).

    Raises:
        FileExistsError: target_dir exists.
        FileNotFoundError: source_dir has no ``config.json`` or no safetensors.
        ImportError: transformers is not installed.
        TypeError: an argument is of another type.
        ValueError: an option is not supported, a file is not whole, transformers does not know the
            model, no layer is left to quantize, or a weight holds NaN or an infinity; the message
            names file and tensor.
    """
    block_size, scale = check_block_size(block_size), check_scale(scale)
    if not isinstance(double_quant, bool):
        raise TypeError(f"double_quant: expected a bool, got {type(double_quant).__name__}")
    check_callback(progress, "progress")
    skip = None if skip_modules is None else check_skip_modules(skip_modules)
    source, target = Path(source_dir), check_new(target_dir, "target_dir")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"source_dir: expected a folder with config.json, got {source}")
    try:
        files = weight_files(source, ("safetensors",))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"source_dir: {error}") from error
    make_plan = _planner()

    options = {"block_size": block_size, "double_quant": double_quant, "scale": scale}
    plan = make_plan(source, skip, options, [name for file in files for name in _names(file)])
    beside = target.parent / f".{target.name}.part"
    beside.mkdir(parents=True, exist_ok=True)
    for left in beside.iterdir():  # of another run
        if left.name not in {file.name for file in files}:
            left.unlink()
    sizes = []
    weight_map: dict[str, str] = {}
    for done, file in enumerate(files, start=1):
        made_as = _fingerprint(file, plan)
        if not _is_made(beside / file.name, made_as):
            _write(file, beside / file.name, plan, options, made_as)
        sizes.append((_tensor_bytes(file), _tensor_bytes(beside / file.name)))
        weight_map |= dict.fromkeys(_names(beside / file.name), file.name)
        if progress is not None:
            progress(done, len(files))
    before, after = (sum(column) for column in zip(*sizes, strict=True))
    single = [file.name for file in files] == ["model.safetensors"]
    _write_rest(source, beside, plan.config, weight_map, None if single else after)
    os.rename(beside, target)
    return QuantizedCheckpoint(len(plan.layers), before, after)


def _planner() -> "Callable[..., Plan]":
    try:
        from nf4.integrations.transformers.dense_layers import make_plan
    except ImportError as error:
        raise ImportError(
            f"expected transformers to know the model's layers, {error}: pip install 'nf4[hf]'"
        ) from error
    return make_plan


def _fingerprint(file: Path, plan: "Plan") -> str:
    """Return what tells a file and its plan from others: names, sizes, the ends of its bytes."""
    size, found = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        found.update(opened.read(_ENDS))
        opened.seek(max(size - _ENDS, 0))
        found.update(opened.read(_ENDS))
    held = [str(file.resolve()), size, file.stat().st_mtime_ns, found.hexdigest()]
    return json.dumps([plan.config, sorted(plan.layers.items()), *held])


def _names(file: Path) -> list[str]:
    """Return the names of a file's tensors, or raise ValueError if it is not whole."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a whole safetensors file, got {error}") from error


def _is_made(file: Path, made_as: str) -> bool:
    """Return whether a file is there, whole, from the same source by the same options."""
    try:
        with safe_open(file, framework="pt") as opened:
            return bool((opened.metadata() or {}).get(_MADE_AS) == made_as)
    except (OSError, SafetensorError):
        return False


def _tensor_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def _write(file: Path, out: Path, plan: "Plan", options: dict[str, Any], made_as: str) -> None:
    """Write what a file becomes."""
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            tensor = opened.get_tensor(name)
            if name not in plan.layers:
                tensors[name] = tensor
                continue
            weight = tensor.T if plan.layers[name] else tensor
            try:
                q = quantize(weight, **options, check=True)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{file}: {name}: {error}") from error
            module = name.removesuffix("weight")
            for part, found in zip(PARTS, q.parts(), strict=True):
                if found is not None:
                    tensors[module + part] = found
    handle, beside = tempfile.mkstemp(prefix=".writing-", dir=out.parent)
    os.close(handle)
    save_file(tensors, beside, metadata={"format": "pt", _MADE_AS: made_as})
    os.chmod(beside, file.stat().st_mode & 0o777)
    os.replace(beside, out)


def _write_rest(
    source: Path,
    beside: Path,
    quantization: dict[str, Any],
    weight_map: dict[str, str],
    total_size: int | None,
) -> None:
    """Write the index, if there are several files, and the config; copy all but weights."""
    for file in source.iterdir():
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not weights:
            shutil.copyfile(file, beside / file.name)
    if total_size is not None:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (beside / _INDEX).write_text(text, encoding="utf-8")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization
    text = json.dumps(config, indent=2) + "\n"
    (beside / "config.json").write_text(text, encoding="utf-8")
