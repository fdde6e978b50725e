"""A folder made of another one file by file: whole or not at all, resumable, by one process.

Files that are done lie in a hidden folder beside the target, with a list of what each was made of,
by hash; a run that is called again goes on after them. When all is done the folder is renamed.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from nf4.files.card import add_card
from nf4.tools.paths import (
    beside,
    check_model_folder,
    locked,
    save_tensors,
    sync_folder,
    try_lock,
    unlock,
    write_file,
)
from nf4.tools.shards import ADAPTER, INDEX, Shards, read_json

_LOCK, _LIST = ".lock", ".made.json"
_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".pt", ".pth", ".onnx", ".ckpt")


def open_source(source_dir: str | os.PathLike[str]) -> Shards:
    """Return the weight files of a model's folder that is to be made into another.

    Raises:
        FileNotFoundError: it has no ``config.json`` or no safetensors.
        ValueError: as `Shards.read`.
    """
    source = check_model_folder(source_dir, "source_dir")
    try:
        return Shards.read(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"source_dir: {error}") from error


class Rewriting:
    """The making of a folder; to be used in a ``with`` block: `write_all`, then `finish`.

    Args:
        shards: the files that others are made of, one of each.
        target: folder to make, which does not exist.
        made_as: what files are made of beside those of source, as JSON: of another making nothing
            is taken over.

    Raises:
        BlockingIOError: another process is making the same folder.
        FileExistsError: another process has made it.
    """

    def __init__(self, shards: Shards, target: Path, made_as: Any) -> None:
        self.shards, self.source, self.target = shards, shards.folder, target
        self.folder = target.parent / f".{target.name}.part"
        self._index: dict[str, Any] | None = None
        self._made_as = json.loads(json.dumps(made_as))
        self._files: dict[str, list[str]] = {}
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Take hold of the folder, and of what a run before has left in it."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.target.parent):
            self.folder.mkdir(exist_ok=True)
            self._lock = try_lock(self.folder / _LOCK)
            if self._lock is None:
                raise BlockingIOError(
                    f"target_dir: expected no other process to write {self.target}, one is at work"
                )
            if os.path.lexists(self.target):
                unlock(self._lock)
                shutil.rmtree(self.folder)
                raise FileExistsError(
                    f"target_dir: expected a folder that does not exist yet, {self.target} does"
                )
        self._files = self._done()
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in (*self._files, _LOCK, _LIST):
                path.unlink()
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of the folder; what is done stays for the next run."""
        unlock(self._lock)

    def _done(self) -> dict[str, list[str]]:
        """Return the files that a run before has made, with the hashes of source and file."""
        try:
            held = read_json(self.folder / _LIST)
            if held["made_as"] != self._made_as:
                return {}
            files = {str(name): [str(source), str(own)] for name, (source, own) in held["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {name: hashes for name, hashes in files.items() if name in self.shards.files}

    def write_all(
        self,
        make: Callable[[str], Mapping[str, Tensor]],
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Write what each file of the source becomes, unless it is there.

        Args:
            make: returns the tensors that a file becomes.
            progress: called with (files done, files in all).

        Returns:
            Bytes of all tensors.

        Raises:
            OSError: a file cannot be written.
        """
        weight_map: dict[str, str] = {}
        total = 0
        for done, name in enumerate(self.shards.files, start=1):
            self._write(name, make)
            made = Shards.header(self.folder, name)
            weight_map |= dict.fromkeys(made, name)
            total += sum(held.nbytes for held in made.values())
            if progress is not None:
                progress(done, len(self.shards.files))
        if self.shards.indexed or len(self.shards.files) > 1:
            self._index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return total

    def _write(self, name: str, make: Callable[[str], Mapping[str, Tensor]]) -> None:
        source, file = _hash(self.source / name), self.folder / name
        if name in self._files and file.is_file() and self._files[name] == [source, _hash(file)]:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside(file) as writing:
            save_tensors(make(name), writing)
        self._files[name] = [source, _hash(file)]
        held = {"made_as": self._made_as, "files": list(self._files.items())}
        write_file(self.folder / _LIST, json.dumps(held))

    def _copy_rest(self) -> None:
        """Copy the files beside the weights, and an adapter; folders are left.

        A link that leads out of the source is left too, but for those of Hugging Face's cache.
        """
        for file in sorted(self.source.iterdir()):
            weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
            if not file.is_file() or (weights and file.name != ADAPTER):
                continue
            if not _leads_inside(file):
                warnings.warn(f"{file}: a link out of its folder, not copied", stacklevel=4)
                continue
            shutil.copyfile(file, self.folder / file.name)

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write all else, wait until it is on the disk, and give the folder its name.

        Args:
            config: of ``config.json``, with a ``quantization_config``.
        """
        self._copy_rest()
        add_card(self.folder, config["quantization_config"])
        texts = {"config.json": config, INDEX: self._index}
        for name, value in texts.items():
            if value is not None:
                write_file(self.folder / name, json.dumps(value, indent=2, sort_keys=True) + "\n")
        sync_folder(self.folder)
        with locked(self.target.parent):
            for name in (_LIST, _LOCK):
                (self.folder / name).unlink()
            os.rename(self.folder, self.target)


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _leads_inside(file: Path) -> bool:
    """Return whether a file lies in its folder, or where Hugging Face's cache keeps its files."""
    if not file.is_symlink():
        return True
    place, folder = file.resolve(), file.parent.resolve()
    if place.is_relative_to(folder):
        return True
    blobs = folder.parent.parent / "blobs"
    return folder.parent.name == "snapshots" and place.is_relative_to(blobs.resolve())
