"""Tables and headings of the benchmarks' pages."""

from collections.abc import Iterable
from typing import Any


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return a table in Markdown, and an empty line."""
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def heading(title: str, around: dict[str, Any]) -> list[str]:
    """Return the first lines of a page of tables: a title, and the `circumstances`."""
    versions = ", ".join(f"{name} {number}" for name, number in around["versions"].items())
    driver = "" if around["driver"] is None else f", driver {around['driver']}"
    commit = f"commit {around['commit']}" + ", with changes" * bool(around["dirty"])
    date = f"{around['date'][:16].replace('T', ' ')} UTC"
    where = f"{around['device']}{driver}; {versions}; {commit}; {date}"
    return [f"## {title}", "", where, ""]
