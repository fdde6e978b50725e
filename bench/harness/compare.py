"""What changed between two files of one device, and whether anything of ours got slower."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from nf4.bench.harness.measure import Timing
from nf4.bench.harness.results import Results, Row, read

# Beyond the spread: this share of the old 80th percentile, and what GPU events resolve
SHARE, RESOLUTION = 0.03, 0.5  # microseconds
OURS = "nf4"  # the names of functions that count begin so


@dataclass(frozen=True)
class Change:
    """A function of ours whose time, memory or launches changed, or that only one file has.

    Attributes:
        op: of the section.
        labels: of the case; none where a file has no section of the op.
        name: of the function.
        kind: "slower", "faster", "memory", "launches", "only in the old" or "only in the new".
        old: its timing, or None.
        new: its timing, or None.
        drift: how much longer the other functions of the case took, 1 at least.
    """

    op: str
    labels: dict[str, str]
    name: str
    kind: str
    old: Timing | None
    new: Timing | None
    drift: float = 1.0


def compare(old: Path, new: Path) -> list[Change]:
    """Compare two files of one device.

    A function is slower if its new 20th percentile is above its old 80th by more than 3 % of that
    and half a microsecond, and its median has grown by more than 3 % beyond the drift: the median
    growth of the functions of the same case that are not ours, if they grew. Faster is the same
    with the files exchanged.

    Raises:
        ValueError: a file is no result of `nf4 bench`, or they are of two devices.
    """
    before, after = read(old), read(new)
    if before.device != after.device:
        raise ValueError(
            f"compare: expected files of one device, got {before.device} and {after.device}"
        )
    ops = dict.fromkeys([*after.sections, *before.sections])
    return [change for op in ops for change in _section(op, before, after)]


def regressed(changes: list[Change]) -> bool:
    """Return whether any function of ours got slower."""
    return any(change.kind == "slower" for change in changes)


def table(changes: list[Change]) -> str:
    """Return the changes as a table in Markdown."""
    if not changes:
        return "Nothing changed beyond the spread.\n"
    columns = ["op", "case", "who", "change", "old µs", "new µs", "new / old", "others"]
    columns += ["memory MB", "launches"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cells(change)) + " |" for change in changes]
    return "\n".join(lines) + "\n"


def _cells(change: Change) -> list[str]:
    old, new = change.old, change.new
    case = ", ".join(f"{name} {value}" for name, value in change.labels.items())
    cells = [change.op, case, change.name, change.kind, _spread(old), _spread(new)]
    if old is None or new is None:
        return [*cells, "", "", "", ""]
    cells += [f"{new.median / old.median:.3f}", f"{change.drift:.3f}"]
    cells.append(f"{_megabytes(old)} → {_megabytes(new)}")
    cells.append("" if old.launches is None else f"{old.launches} → {new.launches}")
    return cells


def _section(op: str, before: Results, after: Results) -> list[Change]:
    """Return the changes of an op, in the order of the new file, then what is gone."""
    if op not in before.sections or op not in after.sections:
        kind = "only in the new" if op in after.sections else "only in the old"
        return [Change(op, {}, "", kind, None, None)]
    olds, news = ({_key(row): row for row in r.sections[op].rows} for r in (before, after))
    changes = []
    for key in dict.fromkeys([*news, *olds]):
        old, new = (rows[key].timings if key in rows else {} for rows in (olds, news))
        changes += _row(op, (news.get(key) or olds[key]).labels, old, new)
    return changes


def _row(
    op: str, labels: dict[str, str], olds: dict[str, Timing], news: dict[str, Timing]
) -> list[Change]:
    """Return the changes of a case."""
    changes = []
    for name in dict.fromkeys([*news, *olds]):
        a, b = olds.get(name), news.get(name)
        if not name.startswith(OURS):
            continue
        if a is None or b is None:
            kind = "only in the new" if a is None else "only in the old"
            changes.append(Change(op, labels, name, kind, a, b))
            continue
        up, down = _drift(olds, news), _drift(news, olds)
        if _slower(a, b, up):
            changes.append(Change(op, labels, name, "slower", a, b, up))
        elif _slower(b, a, down):
            changes.append(Change(op, labels, name, "faster", a, b, 1 / down))
        elif a.launches != b.launches:
            changes.append(Change(op, labels, name, "launches", a, b, up))
        elif _differs(a.peak, b.peak):
            changes.append(Change(op, labels, name, "memory", a, b, up))
    return changes


def _slower(a: Timing, b: Timing, drift: float) -> bool:
    """Return whether b is slower than a, beyond the spread of both and the drift."""
    beyond = b.p20 > a.p80 + max(SHARE * a.p80, RESOLUTION)
    return beyond and b.median > (1 + SHARE) * drift * a.median


def _drift(olds: dict[str, Timing], news: dict[str, Timing]) -> float:
    """Return how much longer the functions that are not ours took, 1 at least."""
    others = [name for name in olds if name in news and not name.startswith(OURS)]
    growth = [news[name].median / olds[name].median for name in others]
    return max(1.0, statistics.median(growth)) if growth else 1.0


def _differs(a: int | None, b: int | None) -> bool:
    """Return whether memory differs by more than 3 % and a megabyte."""
    if a is None or b is None:
        return False
    return abs(a - b) > max(SHARE * a, 1e6)


def _key(row: Row) -> tuple[tuple[str, str], ...]:
    # Which kernel was chosen may change between two commits; the case is the same
    return tuple((name, value) for name, value in row.labels.items() if name != "ours")


def _spread(t: Timing | None) -> str:
    return "" if t is None else f"{t.median:.1f} ({t.p20:.1f}–{t.p80:.1f})"


def _megabytes(t: Timing) -> str:
    return "?" if t.peak is None else f"{t.peak / 1e6:.2f}"
