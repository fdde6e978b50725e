"""What a user asks `nf4 bench` for, checked as far as that needs no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nf4.tools.shapes import MODELS

FOLDER = Path(__file__).resolve().parents[1]  # bench/
OPS = tuple(sorted(file.stem.removeprefix("bench_") for file in FOLDER.glob("bench_*.py")))
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # as torch calls them
_DEVICE = re.compile(r"(cpu|cuda)(:\d+)?")


@dataclass(frozen=True)
class Asked:
    """What to time; None leaves the default of each op.

    Attributes:
        ops: names of `OPS`; none for all.
        shapes: ``"NxK"`` of W, or ``"MxNxK"`` with the rows of x.
        model: a key of `nf4.tools.shapes.MODELS`, in place of shapes.
        rows: of x, M.
        ranks: of the adapter.
        dtypes: names of `DTYPES`.
        device: "cuda", "cuda:1", "cpu"; a GPU by default, if there is one.
        threads: of a CPU.
        rounds: calls of each function; None for 20, or fewer where they are slow.
    """

    ops: Sequence[str] = ()
    shapes: Sequence[str] | None = None
    model: str | None = None
    rows: Sequence[int] | None = None
    ranks: Sequence[int] | None = None
    dtypes: Sequence[str] | None = None
    device: str | None = None
    threads: int | None = None
    rounds: int | None = None

    def check(self) -> None:
        """Raise ValueError if something asked for is possible on no machine."""
        self.chosen_ops()
        for name in ("threads", "rounds"):
            number = getattr(self, name)
            positive(name, [] if number is None else [number])
        for name in ("rows", "ranks"):
            positive(name, getattr(self, name) or [])
        for dtype in self.dtypes or []:
            known("dtypes", dtype, DTYPES)
        if self.model is not None:
            if self.shapes is not None:
                raise ValueError("model: expected a model or shapes, got both")
            known("model", self.model, MODELS)
        elif self.shapes is not None and parse_sizes(self.shapes)[1] and self.rows is not None:
            raise ValueError("rows: expected none beside shapes MxNxK, which have their own")
        if self.device is not None:
            check_device(self.device)

    def chosen_ops(self) -> tuple[str, ...]:
        """Return the ops asked for, each once.

        Raises:
            ValueError: a name is no op's.
        """
        return tuple(dict.fromkeys(known("op", op, OPS) for op in self.ops)) or OPS


def parse_sizes(
    texts: Sequence[str],
) -> tuple[tuple[tuple[int, int], ...], dict[tuple[int, int], tuple[int, ...]]]:
    """Return weights given as ``"4096x4096"`` or ``"16x4096x4096"``, and the rows of the latter.

    Raises:
        ValueError: a text is neither.
    """
    rows: dict[tuple[int, int], tuple[int, ...]] = {}
    for text in texts:
        numbers = text.replace("×", "x").split("x")
        if len(numbers) not in (2, 3) or not all(n.isdecimal() and int(n) for n in numbers):
            raise ValueError(f"shapes: expected NxK or MxNxK such as 16x4096x4096, got {text}")
        *m, n, k = map(int, numbers)
        rows[n, k] = tuple(dict.fromkeys([*rows.get((n, k), ()), *m]))
    return tuple(rows), {shape: m for shape, m in rows.items() if m}


def check_device(text: str) -> None:
    """Raise ValueError unless a device's name is one of a CPU or a GPU."""
    if not _DEVICE.fullmatch(text):
        raise ValueError(f"device: expected cuda, cuda:1, … or cpu, got {text}")


def positive(name: str, numbers: Sequence[int]) -> Sequence[int]:
    """Return numbers, or raise ValueError if one is below 1."""
    for number in numbers:
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    return numbers


def known(name: str, value: str, names: Any) -> str:
    """Return a name, or raise ValueError if it is none of those there are."""
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names)}, got {value}")
    return value
