"""Progress bars for long work, on standard error. What computes knows only `Progress`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Display
from rich.table import Column
from rich.text import Text

_TIME = len("0:00:00")


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
    """Show a progress bar on standard error while the block runs; a spinner if it is one step.

    It is one line, whatever the terminal's width: what is too long is cut.
    """
    console = Console(stderr=True)
    if total == 1:
        with console.status(Text(title[: console.width - 4], no_wrap=True)):
            yield _NoBar()
        return
    columns = _columns(title, total, console.width)
    with Display(*columns, console=console) as display:
        yield _RichBar(display, total)


def _columns(title: str, total: int, width: int) -> tuple[ProgressColumn, ...]:
    """Return the columns of a bar: of the width, what count and time leave goes to the others."""
    spare = max(width - _TIME - 2 * len(str(total)) - 1 - 4, 8)  # a space between columns
    wide = min(44, spare // 2)
    bar = min(40, max((spare - wide) * 2 // 5, 1))
    rest = max(spare - wide - bar, 1)

    def text(form: str, size: int) -> TextColumn:
        cut = Column(width=size, no_wrap=True, overflow="ellipsis")
        return TextColumn(form, markup=False, table_column=cut)

    return (
        text(title.replace("{", "{{").replace("}", "}}"), wide),
        BarColumn(bar_width=bar),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        text("{task.fields[remark]}", rest),
    )
