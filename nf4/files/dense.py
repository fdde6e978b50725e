"""The dense weights in a model's files, read one at a time: never the whole model in memory."""

import importlib.util
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nf4.files.architectures import architectures, are_known
from nf4.models.selection import DEFAULT_SKIP, is_below, resolve_skip, warn_of_unmatched
from nf4.tools.install import missing
from nf4.tools.shards import read_index
from nf4.tools.sources import model_path

# By their names, what is no linear layer though it is a matrix: embeddings
_EMBEDDINGS = re.compile(
    r"embed|(^|[._])(wte|wpe|tok|token|position|pos_emb)([._]|$)|(^|\.)shared\.weight$"
)
_OUTPUT_OF_GGUF = "output"
_SUFFIX = ".weight"
# Kinds of files, and how one of the whole model is called
_KINDS = {
    "safetensors": "model.safetensors",
    "bin": "pytorch_model.bin",
    "gguf": "model.gguf",
}
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    IndexError,
    KeyError,
    ValueError,
)


@dataclass(frozen=True)
class DenseWeight:
    """A weight that `nf4.quantize_model` would quantize.

    Attributes:
        name: of the layer, in the files.
        shape: ``[out_features, in_features]``, with the number of experts before it if any.
        read: reads it; nothing is read before.
        dense: whether it is of floating numbers.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    dense: bool = True


def dense_weights_in(
    source: str | Path, skip_modules: str | Iterable[str] = DEFAULT_SKIP
) -> list[DenseWeight]:
    """Return the weights of linear layers in a model's files, in their order there.

    A transformers folder is asked for its class, if transformers is installed: the layers are those
    that `nf4.quantize_model` would find in it. Elsewhere they are told by their names: matrices
    called ``weight`` whose names do not say embedding. Rows of queries and keys in a GGUF file are
    in its own order, which moves blocks about and leaves their errors as they are.

    Args:
        source: a folder of safetensors or of PyTorch's ``.bin`` files, one such file, a ``.gguf``
            file, or a name of `nf4.tools.sources.MODELS`.
        skip_modules: names of modules to leave out, as for `nf4.quantize_model`; a GGUF file's
            ``output`` is called ``lm_head`` here too.

    Raises:
        FileNotFoundError: there is nothing at source, or no file of weights in the folder.
        ImportError: a GGUF file is to be read and gguf is not installed.
        ValueError: a file is truncated or of another kind, or holds no dense weight of a linear
            layer.
    """
    skip = resolve_skip(skip_modules)
    path = model_path(source)
    files = weight_files(path)
    held = [t for file in files for t in _tensors(file)]
    _check_dense(path, held)
    tensors = [t for t in held if t.dense]
    found = None if files[0].suffix == ".gguf" else _by_class(path, tensors, skip)
    if found is None:
        names = [t.name.removesuffix(_SUFFIX) for t in held]
        warn_of_unmatched(["lm_head" if n == _OUTPUT_OF_GGUF else n for n in names], skip)
        matrices = (t for t in tensors if _is_matrix(t) and all(t.shape))
        found = [t for t in matrices if _is_linear(t.name)]
        found = [_named(t, t.name.removesuffix(_SUFFIX)) for t in found]
        found = [t for t in found if not _is_skipped(t.name, skip)]
    if not found:
        others = sum(not t.dense for t in held)
        beside = f" beside {others} tensors of integers" if others else ""
        raise ValueError(
            f"model: expected dense weights of linear layers, found none in {path}{beside}"
        )
    return found


# What the names of tensors of integers say of who has quantized a model
_METHODS = (
    (re.compile(r"(.*\.)?packed"), "nf4"),
    (re.compile(r".*\.quant_state\.bitsandbytes__\w+|.*\.SCB"), "bitsandbytes"),
    (re.compile(r".*\.(qweight|qzeros)"), "GPTQ or AWQ"),
    (re.compile(r".*\.weight_(packed|shape)"), "compressed-tensors"),
)


def _check_dense(path: Path, held: Iterable[DenseWeight]) -> None:
    """Raise ValueError if tensors of integers are weights that have been quantized already."""
    integers = [t for t in held if not t.dense]
    for pattern, method in _METHODS:
        named = [t.name for t in integers if pattern.fullmatch(t.name)]
        if named:
            raise ValueError(
                f"model: expected dense weights, {path} holds weights that {method} has quantized "
                f"already, such as {named[0]}"
            )
    weights = [t for t in integers if t.name.endswith(_SUFFIX) and len(t.shape) == 2]
    if weights:
        raise ValueError(
            f"model: expected dense weights, {path} holds {weights[0].name} "
            f"{weights[0].shape} as integers: another method has quantized it already"
        )


def _by_class(
    path: Path, tensors: list[DenseWeight], skip: str | tuple[str, ...]
) -> list[DenseWeight] | None:
    """Return the layers that the class of a transformers folder has; None if it has none."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return None
    if not are_known():
        return None
    found = architectures().find(config.parent, [tensor.name for tensor in tensors], skip)
    if found is None:
        return None
    held = {tensor.name: tensor for tensor in tensors if len(tensor.shape) in (2, 3)}
    return [
        _turned(held[one.tensor], one.layer) if one.turned else _named(held[one.tensor], one.layer)
        for one in found
        if one.tensor in held
    ]


def weight_files(path: Path, kinds: Iterable[str] = _KINDS) -> list[Path]:
    """Return the files of a model's weights: by its usual name, by its index, or all of a kind.

    Args:
        path: a folder, or the one file.
        kinds: of `_KINDS`, the first of which there are files.

    Raises:
        FileNotFoundError: there are none, or not all that the index names.
        ValueError: there are several GGUF files that are not parts of one.
    """
    if path.is_file():
        return [path]
    for kind in kinds:
        whole = path / _KINDS[kind]
        index = path / f"{_KINDS[kind]}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [path / name for name in sorted(set(read_index(index).values()))]
        files = sorted(path.glob(f"*.{kind}"))
        if kind == "gguf" and len(files) > 1 and not all("-of-" in file.name for file in files):
            raise ValueError(f"{path}: expected one .gguf file, got {len(files)}; name the file")
        if files:
            return files
    raise FileNotFoundError(
        f"model: expected safetensors, .bin or .gguf files, found none in {path}"
    )


def _tensors(file: Path) -> Iterator[DenseWeight]:
    """Yield the tensors of a file by their whole names; those of integers are not dense."""
    kinds = {".safetensors": _safetensors, ".gguf": _gguf, ".bin": _pickled, ".pt": _pickled}
    kind = kinds.get(file.suffix)
    if kind is None:
        raise ValueError(f"model: expected a .safetensors, .bin or .gguf file, got {file.name!r}")
    try:
        yield from kind(file)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file}: expected a whole {file.suffix} file, got: {reason}") from error


def _safetensors(file: Path) -> Iterator[DenseWeight]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            view = opened.get_slice(name)
            dense = view.get_dtype().startswith(("F", "BF"))
            shape = tuple(view.get_shape())
            yield DenseWeight(name, shape, partial(_from_file, file, name), dense)


def _from_file(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _pickled(file: Path) -> Iterator[DenseWeight]:
    # Files of before 2020 are no archives, and cannot be mapped: they are read whole
    mapped = zipfile.is_zipfile(file)
    held = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    if isinstance(held, Mapping) and isinstance(held.get("state_dict"), Mapping):
        held = held["state_dict"]
    if not isinstance(held, Mapping):
        raise ValueError(f"expected tensors by name, got {type(held).__name__}")
    for name, tensor in held.items():
        if isinstance(tensor, Tensor):
            dense = tensor.is_floating_point()
            yield DenseWeight(name, tuple(tensor.shape), partial(_itself, tensor), dense)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _gguf(file: Path) -> Iterator[DenseWeight]:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(missing("gguf") + ", to read a .gguf file")
    from gguf import GGUFReader

    for tensor in GGUFReader(file).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        yield DenseWeight(tensor.name, shape, partial(_from_gguf, tensor))


def _from_gguf(tensor: Any) -> Tensor:
    from gguf.quants import dequantize

    try:
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError as error:
        raise ValueError(f"{tensor.name}: gguf cannot dequantize it: {error}") from error


def _is_matrix(weight: DenseWeight) -> bool:
    """Return whether a weight is a matrix, or those of experts; not the kernel of a convolution."""
    return len(weight.shape) == 2 or (len(weight.shape) == 3 and "exp" in weight.name)


def _is_linear(name: str) -> bool:
    last = name.rpartition(".")[2]
    named = last in ("weight", "gate_up_proj", "down_proj")
    return named and _EMBEDDINGS.search(name.lower()) is None


def _named(weight: DenseWeight, name: str) -> DenseWeight:
    return DenseWeight(name, weight.shape, weight.read)


def _turned(weight: DenseWeight, name: str) -> DenseWeight:
    """Return the weight of a Conv1D, ``[in_features, out_features]``, as that of a linear layer."""
    return DenseWeight(name, weight.shape[::-1], partial(_transposed, weight))


def _transposed(weight: DenseWeight) -> Tensor:
    return weight.read().T


def _is_skipped(name: str, skip: str | tuple[str, ...]) -> bool:
    return is_below(name, skip) or (name == _OUTPUT_OF_GGUF and is_below("lm_head", skip))
