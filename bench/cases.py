"""What all benchmarks share: sizes, a check before anything is timed, and one table.

A benchmark makes a `Case` for each size; `main` reads the options, times and prints.
"""

import argparse
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor

from nf4.cost import device_of
from nf4.shapes import MODELS, parse_shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# For the titles of benchmarks of a kernel alone, see `kernel`
STAND_IN = "" if GPU else " (no GPU: the reference in the kernel's place)"
VERSIONS = ("torch", "triton", "bitsandbytes", "torchao", "peft")


@dataclass
class Case:
    """One size to time.

    Attributes:
        labels: what tells it from the others, such as ``{"W": "4096×4096", "M": "16"}``.
        functions: what to time, by name; ours is "nf4".
        moved: bytes that must be read and written.
        flops: operations that must be done.
    """

    labels: dict[str, str]
    functions: dict[str, measure.Function]
    moved: float
    flops: float = 0.0

    @property
    def limit(self) -> float:
        """Microseconds that a model of the device says no code can beat; no meaning on a CPU."""
        model = device_of(DEVICE)
        return 1e6 * max(self.moved / model.bandwidth, self.flops / model.flops)


@dataclass
class Options:
    """What to time; each benchmark has its own defaults.

    Attributes:
        shapes: of W, ``[N, K]``.
        rows: of x, M.
        ranks: of the adapter; 0 for none.
        dtypes: names of `DTYPES`.
        rounds: calls of each function.
        out: file for the results as JSON, or None.
    """

    shapes: Sequence[tuple[int, int]] = ((1024, 1024),)
    rows: Sequence[int] = (1,)
    ranks: Sequence[int] = (0,)
    dtypes: Sequence[str] = ("bf16",)
    rounds: int = 20
    out: str | None = None

    def weights(self) -> Iterator[tuple[tuple[int, int], torch.dtype, dict[str, str]]]:
        """Yield each shape and dtype, and their labels."""
        for shape in self.shapes:
            for name in self.dtypes:
                yield shape, DTYPES[name], {"W": f"{shape[0]}×{shape[1]}", "dtype": name}


@dataclass
class Result:
    """The timings of a case, for a file."""

    labels: dict[str, str]
    moved: float
    flops: float
    modelled_limit_us: float | None
    timings: dict[str, measure.Timing] = field(default_factory=dict)


def main(title: str, make: Callable[[Options], Iterable[Case]], defaults: Options) -> None:
    """Read the options, time every case, print a table, and write the file that was asked for."""
    options = _parse(title, defaults)
    results = []
    for case in make(options):
        timings = measure.interleaved(case.functions, DEVICE, options.rounds)
        limit = case.limit if GPU else None
        results.append(Result(case.labels, case.moved, case.flops, limit, timings))
    print(_table(title, results))  # noqa: T201  a benchmark's purpose is its table
    if options.out is not None:
        found = {"title": title, **_circumstances(), "results": [asdict(r) for r in results]}
        beside = Path(f"{options.out}.part")
        beside.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(options.out)


def check_equal(ours: Tensor, reference: Tensor, what: str) -> None:
    """Raise unless a result equals the reference's: a wrong result is not timed."""
    if not torch.equal(ours, reference):
        raise ValueError(f"{what}: expected the reference's result, got another; not timed")


def check_close(ours: Tensor, exact: Tensor, peer: Tensor, what: str) -> None:
    """Raise if a result is further from the exact one than 1.1 times a peer's in 16 bits."""
    error, allowed = ((y.double() - exact).norm() / exact.norm() for y in (ours, peer))
    if not error <= 1.1 * allowed:
        message = f"a relative error of at most {1.1 * allowed:.3g}, got {error:.3g}; not timed"
        raise ValueError(f"{what}: expected {message}")


def kernel(op: str) -> Callable[..., Any]:
    """Return a kernel's launcher, or its reference where there is no GPU."""
    package = "nf4.kernels" if GPU else "nf4.reference"
    found: Callable[..., Any] = getattr(import_module(f"{package}.{op}"), op)
    return found


def copy_of(moved: float) -> measure.Function:
    """Return a copy within the device that reads and writes as many bytes together."""
    source = torch.empty(int(moved) // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _parse(title: str, defaults: Options) -> Options:
    parser = argparse.ArgumentParser(description=f"Time: {title}.")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--shapes", nargs="+", type=_shape, metavar="NxK", help="of W")
    sizes.add_argument("--model", choices=MODELS, help="the shapes of a model's layers")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help="of x")
    parser.add_argument("--ranks", nargs="+", type=int, metavar="r", help="of the adapter")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--rounds", type=int, help="calls of each function")
    parser.add_argument("--out", help="file for the results as JSON")
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    model = given.pop("model", None)
    if model is not None:
        given["shapes"] = MODELS[model]
    return Options(**{**vars(defaults), **given})


def _shape(text: str) -> tuple[int, int]:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _circumstances() -> dict[str, Any]:
    """Return device, versions, commit and date."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    versions = {}
    for package in VERSIONS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"device": name, "versions": versions, "commit": commit or None, "date": date}


def _table(title: str, results: list[Result]) -> str:
    around = _circumstances()
    versions = ", ".join(f"{k} {v}" for k, v in around["versions"].items())
    lines = [f"## {title}", "", f"{around['device']}; {versions}; commit {around['commit']}", ""]
    for i, result in enumerate(results):
        if i == 0:
            head = [*result.labels, "who", "median µs", "p20–p80 µs", "GB/s", "TFLOP/s"]
            head += ["of the modelled limit", "extra MB", "time / ours"]
            lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name, t in result.timings.items():
            share = result.modelled_limit_us
            cells = [
                *result.labels.values(),
                name,
                f"{t.median:.1f}",
                f"{t.p20:.1f}–{t.p80:.1f}",
                f"{result.moved / t.median / 1e3:.1f}",
                f"{result.flops / t.median / 1e6:.2f}" if result.flops else "",
                "" if share is None else f"{share / t.median:.0%}",
                "" if t.peak is None else f"{t.peak / 1e6:.1f}",
                f"{t.median / result.timings['nf4'].median:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
