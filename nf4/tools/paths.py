"""Files and folders: written whole or not at all, and where the package has its own.

What is being written lies beside its place under a hidden name and is renamed when it is whole and
on the disk. Whoever writes holds a lock on it, so that the next run can tell what a killed one has
left, and takes that away.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

if sys.platform != "win32":  # where nothing is locked, and nothing taken away
    import fcntl

_LOCK = ".lock"  # in a folder that is being written
_TEMPORARY = re.compile(r"[a-z0-9_]{8}")  # what tempfile ends names with
_OS_ERROR = re.compile(r"os error (\d+)")


def check_new(path: str | os.PathLike[str], name: str) -> Path:
    """Return path, or raise FileExistsError if there is anything at it."""
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{name}: expected a folder that does not exist yet, {path} does")
    return path


def check_model_folder(path: str | os.PathLike[str], name: str) -> Path:
    """Return the path of a model's folder, or raise FileNotFoundError if it has no config."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name}: expected a folder with config.json, got {path}")
    return path


def check_adapter_folder(path: str | os.PathLike[str], name: str) -> Path:
    """Return the path of an adapter's folder, or raise FileNotFoundError if a file is missing."""
    path = Path(path)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{name}: expected a folder with {file}, got {path}")
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside path, and rename it to path if the block ends well.

    If the block raises, the folder is removed. Folders above path are made as needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as folder:
        yield folder
        folder.chmod(0o777 & ~_umask())
        sync_folder(folder)
        with locked(path.parent):
            (folder / _LOCK).unlink(missing_ok=True)
            os.rename(folder, path)
        _sync(path.parent)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a file to make beside path, and rename it to path if the block ends well.

    If the block raises, the file is removed, and what is at path stays as it was.
    """
    with _temporary(path) as folder:
        file = folder / path.name
        yield file
        file.chmod(0o666 & ~_umask())
        _sync(file)
        os.replace(file, path)
        _sync(path.parent)
        shutil.rmtree(folder)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a folder beside path that no other run takes for left over while the block runs."""
    with locked(path.parent):
        _clean(path)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        lock = try_lock(folder / _LOCK)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        unlock(lock)


def write_file(path: Path, text: str) -> None:
    """Write a text beside path, and rename it to path. Folders above path are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as file:
        file.write_text(text, encoding="utf-8")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write safetensors at a path; the same tensors without metadata give the same bytes.

    Args:
        tensors: by name.
        path: of the file.
        metadata: beside the format, in an order of safetensors' own.

    Raises:
        OSError: the disk is full, or the file cannot be written for another reason; with its path.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        number = int(found[1]) if found else errno.EIO
        reason = os.strerror(number) if found else str(error)
        raise OSError(number, reason, str(path)) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while its entries are looked at and made, as others do here."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that knows no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def try_lock(file: Path) -> int | None:
    """Lock a file, which is made if it is not there, until `unlock` or the end of the process.

    Returns:
        What `unlock` takes; -1 where nothing can be locked; None if another process holds it.
    """
    if sys.platform == "win32":
        file.touch()
        return -1
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system that knows no locks
        os.close(handle)
        return -1
    return handle


def unlock(lock: int | None) -> None:
    """Let go of what `try_lock` has locked."""
    if lock is not None and lock >= 0:
        os.close(lock)


def _clean(path: Path) -> None:
    """Remove what killed runs have left beside a path; the folder must be `locked`."""
    prefix = f".{path.name}-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        named = _TEMPORARY.fullmatch(left.name.removeprefix(prefix))
        if named is None or left.is_symlink() or not left.is_dir():
            continue
        lock = try_lock(left / _LOCK)
        if lock is not None and lock >= 0:
            shutil.rmtree(left, ignore_errors=True)
        unlock(lock)


def sync_folder(folder: Path) -> None:
    """Wait until all files of a folder, and the names of its entries, are on the disk."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(path) / name)
        _sync(Path(path))


def _sync(path: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems do not sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            error.filename = str(path)
            raise
    finally:
        os.close(handle)


def beside_package(name: str) -> Path:
    """Return a folder that an installed nf4 has in its package, and a checkout beside it."""
    here = Path(__file__).resolve().parents[1]
    installed = here / name
    return installed if installed.is_dir() else here.parent / name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
