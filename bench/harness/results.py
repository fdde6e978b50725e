"""Files of measurements: one a device, a section an op; a new run replaces what it measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nf4.bench.harness.ceilings import Ceilings
from nf4.bench.harness.circumstances import FOLDER, slug
from nf4.bench.harness.measure import Timing
from nf4.tools.paths import write_file

FORMAT = "nf4-bench-1"
RESULTS = FOLDER / "results"


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        labels: what tells it from the others.
        dtype: whose products limit its operations.
        moved: bytes that must be read and written.
        flops: operations that must be done.
        ceiling: microseconds at the measured ceilings.
        modelled: microseconds that a model of the device says no code can beat; None on a CPU.
        timings: by name of function, ours first.
        absent: peers that are installed and were not timed, and why.
    """

    labels: dict[str, str]
    dtype: str
    moved: float
    flops: float
    ceiling: float
    modelled: float | None
    timings: dict[str, Timing]
    absent: dict[str, str]


@dataclass(frozen=True)
class Section:
    """What a run measured of an op.

    Attributes:
        title: of the op.
        circumstances: see `nf4.bench.harness.circumstances`.
        ceilings: of the same run.
        options: what was asked for, after defaults.
        rows: one a case.
    """

    title: str
    circumstances: dict[str, Any]
    ceilings: Ceilings
    options: dict[str, Any]
    rows: list[Row]


@dataclass(frozen=True)
class Results:
    """What a file holds: a device's name, and sections by op."""

    device: str
    sections: dict[str, Section]

    def to_json(self) -> str:
        """Return the text of the file."""
        sections = {op: asdict(section) for op, section in self.sections.items()}
        found = {"format": FORMAT, "device": self.device, "sections": sections}
        return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def default_path(device: str) -> Path:
    """Return the file of a device: in bench/results of a checkout, else in the current folder."""
    folder = RESULTS if RESULTS.is_dir() else Path.cwd()
    return folder / f"{slug(device)}.json"


def load_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; an object, of any format.

    Raises:
        ValueError: it is none, or not there.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON file, got {error}") from None
    return found if isinstance(found, dict) else {}


def read(path: Path) -> Results:
    """Return the results of a file.

    Raises:
        ValueError: the file is not there, or is another.
    """
    return from_json(load_json(path), str(path))


def from_json(found: dict[str, Any], name: str) -> Results:
    """Return the results of a parsed file; its name is for errors.

    Raises:
        ValueError: it is of another format.
    """
    kind = found.get("format")
    if kind != FORMAT:
        raise ValueError(f"{name}: expected results of nf4 bench, format {FORMAT}, got {kind}")
    try:
        sections = {op: _section(section) for op, section in found["sections"].items()}
        return Results(found["device"], sections)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: expected results of nf4 bench, got {error!r}") from None


def check_target(path: Path, device: str) -> None:
    """Raise ValueError unless the results of a device may be written at path."""
    if path.exists():
        held = read(path).device
        if held != device:
            raise ValueError(f"out: expected a file of {device}, {path} holds results of {held}")


def add(path: Path, device: str, sections: dict[str, Section]) -> None:
    """Write sections into the file of a device, in place of those of the same ops."""
    held = read(path).sections if path.exists() else {}
    together = {op: section for op, section in sorted({**held, **sections}.items())}
    write_file(path, Results(device, together).to_json())


def _section(found: dict[str, Any]) -> Section:
    rows = []
    for row in found["rows"]:
        timings = {name: Timing(**timing) for name, timing in row["timings"].items()}
        rows.append(Row(**{**row, "timings": timings}))
    ceilings = Ceilings(**found["ceilings"])
    return Section(**{**found, "ceilings": ceilings, "rows": rows})
