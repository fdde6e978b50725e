"""A folder made of another one file by file: whole or not at all, resumable, by one job.

Files that are done lie in a hidden folder beside the target, with a list of what each was made of,
by hash; a run that is called again goes on after them. When all is done the folder is renamed.
Of a job's processes each makes its share of the files and keeps a list of its own, and a lock; all
else rank 0 does. What a file becomes depends on no other, so that any number makes the same bytes.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from nf4.files.card import add_card
from nf4.tools.job import Ranks, divide
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
from nf4.tools.streamed import Streamed

# Beside those of rank 0: .lock-1, .made-1.json and so on; .job tells its processes what it is
_LOCK, _LIST, _JOB = ".lock", ".made.json", ".job"
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
        ranks: the processes that make it; by default this one.

    Attributes:
        notes: what is to be known of each file that is made, as JSON; what makes a file puts it
            there, and it is kept with the file for the next run.

    Raises:
        BlockingIOError: another process, or job, is making the same folder.
        FileExistsError: another process has made it.
        FileNotFoundError: the processes of a job do not share the folder.
        ValueError: the processes of a job were given other arguments, or another source.
    """

    def __init__(
        self, shards: Shards, target: Path, made_as: Any, ranks: Ranks | None = None
    ) -> None:
        self.shards, self.source, self.target = shards, shards.folder, target
        self.folder = target.parent / f".{target.name}.part"
        self._ranks = ranks or Ranks()
        self._index: dict[str, Any] | None = None
        self._made_as = json.loads(json.dumps(made_as))
        self._files: dict[str, list[str]] = {}
        self.notes: dict[str, Any] = {}
        self._share: list[str] = []  # of the files, that this process makes
        self._reported = 0
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Take hold of the folder, and of what a run before has left in it."""
        rank = self._ranks.rank
        self._ranks.to_first("here", lambda: None)  # before anything is written
        try:
            begun = self._ranks.from_first("begun", self._begin)
            self._share = begun["shares"][rank]
            if rank:
                self._join(begun)
        except BaseException:
            unlock(self._lock)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of the folder; what is done stays for the next run."""
        unlock(self._lock)

    def _begin(self) -> dict[str, Any]:
        """Take the folder for a job, and return what its other processes are to know."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.target.parent):
            self.folder.mkdir(exist_ok=True)
            self._lock = try_lock(self.folder / _LOCK)
            if self._lock is None or self._others_work():
                raise BlockingIOError(
                    f"target_dir: expected no other process to write {self.target}, one is at work"
                )
            (self.folder / _JOB).unlink(missing_ok=True)
            if os.path.lexists(self.target):
                shutil.rmtree(self.folder)
                raise FileExistsError(
                    f"target_dir: expected a folder that does not exist yet, {self.target} does"
                )
        self._take_over()
        job = secrets.token_hex(8)
        if self._ranks.count > 1:
            write_file(self.folder / _JOB, job)
        known = {"job": job, "work": self._digest(), "files": self._files}
        return known | {"shares": self._shares()}

    def _others_work(self) -> bool:
        """Return whether a process is left of another job, whose rank 0 has ended."""
        for file in self.folder.glob(f"{_LOCK}-*"):
            lock = try_lock(file)
            if lock is None:
                return True
            unlock(lock)
        return False

    def _join(self, begun: Mapping[str, Any]) -> None:
        """Take part in the job that rank 0 has begun."""
        rank = self._ranks.rank
        if begun["work"] != self._digest():
            raise ValueError(
                "source_dir: expected the source and the arguments of rank 0 in every process, "
                "got others"
            )
        job, found = self.folder / _JOB, ""
        with contextlib.suppress(FileNotFoundError), locked(self.target.parent):
            found = job.read_text(encoding="utf-8")
            if found == begun["job"]:
                self._lock = try_lock(self.folder / f"{_LOCK}-{rank}")
        if found != begun["job"]:
            raise FileNotFoundError(
                "target_dir: expected a place that all processes share, found nothing of rank 0 in "
                f"{self.folder}"
            )
        self._files = {n: held for n, held in begun["files"].items() if n in self._share}

    def _digest(self) -> str:
        """Return what tells the work of this process from another."""
        held = [(n, t.file, t.shape, t.dtype) for n, t in self.shards.tensors.items()]
        work = json.dumps([self.target.name, self._made_as, held])
        return hashlib.sha256(work.encode()).hexdigest()

    def _shares(self) -> list[list[str]]:
        """Return which files each process makes: about equal bytes of those to write."""
        sizes = dict.fromkeys(self.shards.files, 0)
        for held in self.shards.tensors.values():
            sizes[held.file] += held.nbytes
        made = {name for name in self._files if (self.folder / name).is_file()}
        found: list[list[str]] = [[] for _ in range(self._ranks.count)]
        for there in (False, True):
            some = {name: size for name, size in sizes.items() if (name in made) == there}
            for share, names in zip(found, divide(some, self._ranks.count), strict=True):
                share += names
        return [sorted(share, key=self.shards.files.index) for share in found]

    def _take_over(self) -> None:
        """Read what a run before has made, by however many processes, and remove all else."""
        lists = sorted(self.folder.glob(_list_of("*")))
        self._files = self._listed(self.folder / _LIST)
        for file in lists:  # later than that of rank 0, which was made of such
            self._files |= self._listed(file)
        if lists:
            self._write_list()
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in (*self._files, _LOCK, _LIST):
                path.unlink()

    def _listed(self, file: Path) -> dict[str, list[str]]:
        """Return the files of a list, with the hashes of source and file."""
        try:
            held = read_json(file)
            if held["made_as"] != self._made_as:
                return {}
            files = {str(name): [str(source), str(own)] for name, (source, own) in held["files"]}
            self.notes |= dict(held.get("notes", {}))
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {name: hashes for name, hashes in files.items() if name in self.shards.files}

    def write_all(
        self,
        make: Callable[[str], Mapping[str, Tensor] | Streamed],
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Write what each file of the source becomes, unless it is there.

        Args:
            make: returns the tensors that a file becomes, or what makes them one at a time.
            progress: called in rank 0 with (files done by all processes, files in all).

        Returns:
            Bytes of all tensors.

        Raises:
            OSError: a file cannot be written.
        """
        report = partial(self._report, progress)
        for name in self._share:
            self._ranks.check()
            self._write(name, make)
            self._ranks.step()
            report()
        self._ranks.to_first("written", report)
        return int(self._ranks.from_first("total", self._read_headers))

    def _report(self, progress: Callable[[int, int], None] | None) -> None:
        if progress is None or self._ranks.rank:
            return
        while self._reported < self._ranks.steps():
            self._reported += 1
            progress(self._reported, len(self.shards.files))

    def _read_headers(self) -> int:
        """Make the index of all files; return the bytes of all tensors."""
        weight_map: dict[str, str] = {}
        total = 0
        for name in self.shards.files:
            made = Shards.header(self.folder, name)
            weight_map |= dict.fromkeys(made, name)
            total += sum(held.nbytes for held in made.values())
        if self.shards.indexed or len(self.shards.files) > 1:
            self._index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return total

    def _write(self, name: str, make: Callable[[str], Mapping[str, Tensor] | Streamed]) -> None:
        source, file = _hash(self.source / name), self.folder / name
        if name in self._files and file.is_file() and self._files[name] == [source, _hash(file)]:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside(file) as writing:
            made = make(name)
            if isinstance(made, Streamed):
                made.save(writing)
            else:
                save_tensors(made, writing)
        self._files[name] = [source, _hash(file)]
        self._write_list()

    def _write_list(self) -> None:
        rank = self._ranks.rank
        held = {"made_as": self._made_as, "files": list(self._files.items())}
        if self.notes:
            held["notes"] = self.notes
        write_file(self.folder / (_list_of(rank) if rank else _LIST), json.dumps(held))

    def _copy_rest(self, leave: Iterable[str]) -> None:
        """Copy the files beside the weights, and an adapter, but those to leave; no folders.

        A link that leads out of the source is left too, but for those of Hugging Face's cache.
        """
        for file in sorted(self.source.iterdir()):
            weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
            if not file.is_file() or (weights and file.name != ADAPTER) or file.name in leave:
                continue
            if not _leads_inside(file):
                warnings.warn(f"{file}: a link out of its folder, not copied", stacklevel=6)
                continue
            shutil.copyfile(file, self.folder / file.name)

    def finish(
        self,
        config: Mapping[str, Any],
        card: Callable[[Path], None] | None = None,
        leave: Iterable[str] = (),
    ) -> None:
        """Write all else, wait until it is on the disk, and give the folder its name.

        Rank 0 does; the other processes wait for it.

        Args:
            config: of ``config.json``; without a card it has a ``quantization_config``.
            card: writes the model card of a folder; by default that of weights in four bits.
            leave: names of files not to copy.
        """
        card = card or partial(add_card, config=config["quantization_config"])
        self._ranks.from_first("finished", partial(self._finish, config, card, frozenset(leave)))

    def _finish(
        self, config: Mapping[str, Any], card: Callable[[Path], None], leave: Iterable[str]
    ) -> None:
        self._copy_rest(leave)
        card(self.folder)
        texts = {"config.json": config, INDEX: self._index}
        for name, value in texts.items():
            if value is not None:
                write_file(self.folder / name, json.dumps(value, indent=2, sort_keys=True) + "\n")
        sync_folder(self.folder)
        with locked(self.target.parent):
            others = range(1, self._ranks.count)
            names = [name for n in others for name in (_list_of(n), f"{_LOCK}-{n}")]
            for name in (*names, *([_JOB] if others else []), _LIST, _LOCK):
                (self.folder / name).unlink(missing_ok=True)
            os.rename(self.folder, self.target)


def _list_of(rank: int | str) -> str:
    """Return the name of the list of a process that is not rank 0."""
    return f".made-{rank}.json"


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
