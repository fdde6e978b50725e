"""A folder made of another one file by file: whole or not at all, resumable, by one process.

Files that are done lie in a hidden folder beside the target, with a list of what each was made of,
by hash; a run that is called again goes on after them. When all is done the folder is renamed.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from nf4.files import beside, locked, save_tensors, sync_folder, try_lock, unlock, write_file
from nf4.shards import ADAPTER, INDEX, read_json

_LOCK, _LIST = ".lock", ".made.json"
_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".pt", ".pth", ".onnx", ".ckpt")


class Rewriting:
    """The making of a folder; to be used in a ``with`` block that ends with `finish`.

    Args:
        source: folder that files are made of.
        target: folder to make, which does not exist.
        files: that are to be made of those of source, relative to it.
        made_as: what files are made of beside those of source, as JSON: of another making nothing
            is taken over.

    Raises:
        BlockingIOError: another process is making the same folder.
        FileExistsError: another process has made it.
    """

    def __init__(self, source: Path, target: Path, files: Iterable[str], made_as: Any) -> None:
        self.source, self.target, self._wanted = source, target, set(files)
        self.folder = target.parent / f".{target.name}.part"
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
        return {name: hashes for name, hashes in files.items() if name in self._wanted}

    def write(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Write what a file of the source becomes, unless it is there.

        Args:
            name: of the file, relative to both folders.
            make: returns the tensors.

        Returns:
            Whether it was written.

        Raises:
            OSError: it cannot be written.
        """
        source, file = _hash(self.source / name), self.folder / name
        if name in self._files and file.is_file() and self._files[name] == [source, _hash(file)]:
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside(file) as writing:
            save_tensors(make(), writing)
        self._files[name] = [source, _hash(file)]
        held = {"made_as": self._made_as, "files": list(self._files.items())}
        write_file(self.folder / _LIST, json.dumps(held))
        return True

    def copy_rest(self) -> None:
        """Copy the files beside the weights, and an adapter; folders are left.

        A link that leads out of the source is left too, but for those of Hugging Face's cache.
        """
        for file in sorted(self.source.iterdir()):
            weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
            if not file.is_file() or (weights and file.name != ADAPTER):
                continue
            if not _leads_inside(file):
                warnings.warn(f"{file}: a link out of its folder, not copied", stacklevel=3)
                continue
            shutil.copyfile(file, self.folder / file.name)

    def finish(self, config: Mapping[str, Any], index: Mapping[str, Any] | None) -> None:
        """Write config and index, wait until all is on the disk, and give the folder its name.

        Args:
            config: of ``config.json``.
            index: of ``model.safetensors.index.json``; None for none.
        """
        texts = {"config.json": config, INDEX: index}
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
