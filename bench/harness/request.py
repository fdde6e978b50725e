"""What a user asks `nf4 bench` for: checked as a whole before anything is made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nf4.bench.harness.cases import DEVICE, DTYPES, Options
from nf4.bench.harness.circumstances import FOLDER
from nf4.tools.shapes import MODELS

OPS = tuple(sorted(file.stem.removeprefix("bench_") for file in FOLDER.glob("bench_*.py")))


@dataclass(frozen=True)
class Request:
    """What to time; None leaves the default of each op.

    Attributes:
        ops: names of `OPS`; none for all.
        shapes: ``"NxK"`` of W, or ``"MxNxK"`` with the rows of x.
        model: a key of `nf4.tools.shapes.MODELS`, in place of shapes.
        rows: of x, M.
        ranks: of the adapter.
        dtypes: names of `nf4.bench.harness.cases.DTYPES`.
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

    def chosen_ops(self) -> tuple[str, ...]:
        """Return the ops asked for, each once.

        Raises:
            ValueError: a name is no op's.
        """
        return tuple(dict.fromkeys(_known("op", op, OPS) for op in self.ops)) or OPS

    def chosen_device(self) -> torch.device:
        """Return the device asked for.

        Raises:
            ValueError: it is not there, or threads were asked for of a GPU.
        """
        device = DEVICE if self.device is None else find_device(self.device)
        if self.threads is not None:
            _positive("threads", [self.threads])
            if device.type != "cpu":
                raise ValueError(f"threads: expected a CPU to use them, got {device}")
        return device

    def options(self, on_cpu: Options, on_gpu: Options) -> Options:
        """Return an op's defaults, with what was asked for in their place.

        Raises:
            ValueError: something asked for is not possible.
        """
        device = self.chosen_device()
        given: dict[str, Any] = {"device": device}
        for name in ("rows", "ranks"):
            numbers = getattr(self, name)
            if numbers is not None:
                given[name] = tuple(dict.fromkeys(_positive(name, numbers)))
        if self.rounds is not None:
            given["rounds"] = _positive("rounds", [self.rounds])[0]
        if self.dtypes is not None:
            names = (_known("dtypes", name, DTYPES) for name in self.dtypes)
            given["dtypes"] = tuple(dict.fromkeys(names))
        if self.model is not None:
            if self.shapes is not None:
                raise ValueError("model: expected a model or shapes, got both")
            given["shapes"] = MODELS[_known("model", self.model, MODELS)]
        elif self.shapes is not None:
            given["shapes"], given["rows_of"] = parse_sizes(self.shapes)
            if given["rows_of"] and self.rows is not None:
                raise ValueError("rows: expected none beside shapes MxNxK, which have their own")
        return replace(on_gpu if device.type == "cuda" else on_cpu, **given)


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


def find_device(text: str) -> torch.device:
    """Return a device by its name.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"device: expected cuda, cuda:1, … or cpu, got {text}")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else 0
    if index >= count:
        raise ValueError(f"device: expected one of the {count} GPUs found, got {text}")
    return torch.device("cuda", index)


def _positive(name: str, numbers: Sequence[int]) -> Sequence[int]:
    for number in numbers:
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    return numbers


def _known(name: str, value: str, known: Any) -> str:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value}")
    return value
