"""Progress bars for long work, on standard error. What computes knows only `Progress`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Display


class Bar(Protocol):
    """A progress bar: `step` moves it on, with a remark to show beside it."""

    def step(self, remark: str = "") -> None:
        """Move on by one."""


# Makes a context manager around a `Bar` from a title and a number of steps
Progress = Callable[[str, int], AbstractContextManager[Bar]]


@contextmanager
def steps(progress: Progress, title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar while the block runs, and yield what moves it on."""
    with progress(title, total) as bar:
        yield bar.step


class _RichBar:
    """One task of a rich progress display."""

    def __init__(self, display: Display, total: int) -> None:
        self._display = display
        self._task = display.add_task("", total=total, remark="")

    def step(self, remark: str = "") -> None:
        """Move on by one."""
        self._display.update(self._task, advance=1, remark=remark)


class _NoBar:
    """The bar of a step that is over as soon as it moves."""

    def step(self, remark: str = "") -> None:
        """Do nothing."""


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Bar]:
    """Show a progress bar on standard error while the block runs; a spinner if it is one step."""
    if total == 1:
        with Console(stderr=True).status(title):
            yield _NoBar()
        return
    columns = (
        TextColumn(f"{title:44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Display(*columns, console=Console(stderr=True)) as display:
        yield _RichBar(display, total)
