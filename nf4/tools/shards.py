"""The safetensors files of a model's folder: which there are, and what they hold, checked whole."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"  # PEFT's, which fits whatever the base is made into
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Held:
    """A tensor in a file.

    Attributes:
        file: relative to the folder, with ``/``.
        shape: sizes.
        dtype: as safetensors call it, such as "BF16".
    """

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        bits = int(re.sub(r"^[A-Z]+(\d+).*|.*", r"\1", self.dtype) or 8)
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class Shards:
    """What the weight files of a folder hold.

    Attributes:
        folder: where.
        tensors: by name, in the order of files.
        indexed: whether an index names them.
    """

    folder: Path
    tensors: Mapping[str, Held]
    indexed: bool

    @classmethod
    def read(cls, folder: Path) -> "Shards":
        """Read the index and the header of every file; no weight is read.

        Raises:
            FileNotFoundError: there are no safetensors, or not all that the index names.
            ValueError: a file or the index is not whole, two files hold a tensor of one name, or
                index and files do not agree; the message names file and tensor.
        """
        index = folder / INDEX
        if not (folder / WHOLE).is_file() and index.is_file():
            said = read_index(index)
            names = sorted(set(said.values()))
        else:
            found = [WHOLE] if (folder / WHOLE).is_file() else _files_in(folder)
            said, names = None, found
        if not names:
            raise FileNotFoundError(f"expected safetensors files, found none in {folder}")
        _check_numbers(folder, names)
        tensors: dict[str, Held] = {}
        for name in names:
            for tensor, held in cls.header(folder, name).items():
                if tensor in tensors:
                    raise ValueError(
                        f"{folder / name}: {tensor}: expected it in one file, got it in "
                        f"{tensors[tensor].file} too"
                    )
                tensors[tensor] = held
        if said is not None:
            _check_index(index, said, tensors)
        return cls(folder, tensors, said is not None)

    @cached_property
    def files(self) -> list[str]:
        """The files, relative to the folder, in order."""
        return list(dict.fromkeys(held.file for held in self.tensors.values()))

    @staticmethod
    def header(folder: Path, file: str) -> dict[str, Held]:
        """Return what one file of a folder holds, by name.

        Raises:
            ValueError: it is not whole; the message names it.
        """
        path, found = folder / file, {}
        try:
            with safe_open(path, framework="pt") as opened:
                for tensor in opened.keys():  # noqa: SIM118
                    view = opened.get_slice(tensor)
                    found[tensor] = Held(file, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a whole safetensors file, got {error}") from error
        return found

    def names_in(self, file: str) -> list[str]:
        """Return the names of the tensors of a file."""
        return [name for name, held in self.tensors.items() if held.file == file]

    def tensor(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            ValueError: the file has become another one; the message names it.
        """
        file = self.folder / self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: {name}: expected this tensor, got: {error}") from error
        return tensor


def _files_in(folder: Path) -> list[str]:
    found = (path.name for path in folder.glob("*.safetensors") if path.is_file())
    return sorted(name for name in found if name != ADAPTER)


def read_json(file: Path) -> Any:
    """Return what a file holds as JSON.

    Raises:
        ValueError: it holds none, or none that can be read; the message names the file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{file}: expected JSON, got {reason}") from error


def read_index(file: Path, exists: Callable[[Path], bool] = Path.is_file) -> dict[str, str]:
    """Return which file holds each tensor, by an index.

    Args:
        file: the index.
        exists: says whether a file is there.

    Raises:
        FileNotFoundError: a file that it names is not there.
        ValueError: it is no index, or names files outside its folder.
    """
    index = read_json(file)
    said = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(said, dict) or not said:
        kind = type(index).__name__ if not isinstance(index, dict) else repr(said)[:60]
        raise ValueError(f"{file}: expected a weight_map of tensors and files, got {kind}")
    for tensor, name in said.items():
        if not isinstance(name, str) or not _is_inside(name):
            raise ValueError(
                f"{file}: {tensor}: expected the name of a file in this folder, got {name!r}"
            )
    for name in sorted(set(said.values())):
        if not exists(file.parent / name):
            raise FileNotFoundError(f"{file}: expected {name} beside it, found none")
    return said


def _is_inside(name: str) -> bool:
    """Return whether a name is that of a file in a folder or below it, on any system."""
    path = PurePosixPath(name)
    plain = name and "\\" not in name and ":" not in name and "\0" not in name
    return bool(plain) and not path.is_absolute() and ".." not in path.parts


def _check_numbers(folder: Path, names: list[str]) -> None:
    """Raise ValueError if files that are numbered are not all there."""
    for stem, _, total in {m.groups() for m in map(_NUMBERED.fullmatch, names) if m}:
        wanted = [f"{stem}-{i:05}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(
                f"{folder}: expected all of {int(total)} files of weights, {missing[0]} is "
                f"{'not in the index' if (folder / missing[0]).is_file() else 'not there'}"
            )


def _check_index(index: Path, said: Mapping[str, str], tensors: Mapping[str, Held]) -> None:
    for name, file in said.items():
        held = tensors.get(name)
        if held is None or held.file != file:
            where = "found none" if held is None else f"found it in {held.file}"
            raise ValueError(f"{index}: expected {name} in {file}, {where}")
    for name, held in tensors.items():
        if name not in said:
            raise ValueError(f"{index}: expected every tensor, {name} of {held.file} is not in it")
