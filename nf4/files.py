"""Files and folders: written whole or not at all, and where the package has its own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(path: str | os.PathLike[str], name: str) -> Path:
    """Return path, or raise FileExistsError if there is anything at it."""
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{name}: expected a folder that does not exist yet, {path} does")
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside path, and rename it to path if the block ends well.

    If the block raises, the folder is removed. Folders above path are made as needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield beside
        beside.chmod(0o777 & ~_umask())
        os.rename(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def beside_package(name: str) -> Path:
    """Return a folder that an installed nf4 has in its package, and a checkout beside it."""
    here = Path(__file__).resolve().parent
    installed = here / name
    return installed if installed.is_dir() else here.parent / name


def write_file(path: Path, text: str) -> None:
    """Write a text beside path, and rename it to path. Folders above path are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield an empty file beside path, and rename it to path if the block ends well.

    If the block raises, the file is removed, and what is at path stays as it was.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    file = Path(name)
    try:
        yield file
        file.chmod(0o666 & ~_umask())
        os.replace(file, path)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
