"""Run everything that needs a GPU, in less than nine minutes, and leave all of it in one folder.

Tests, verification, tuning, benchmarks, a whole model, and the checkers of memory and races where
they are installed: see gpu_stages.py. Needs a checkout and a Python with PyTorch and Triton; what
else is missing is left out, with the reason. Each stage is a process with a limit of time; no stage
stops another. The folder's summary.md and summary.json are written anew before and after each.

make gpu                                          # or: python bench/gpu_day/gpu_day.py
make gpu ARGS="--stages verify tune --out found"  # some stages, another folder
make gpu ARGS="--device cpu" PYTHON=.venv/bin/python  # a trial without a GPU, at tiny sizes
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from gpu_run import Result, run_wave
from gpu_stages import GROUPS, ROOT, SECONDS, Stage, plan

FOLDER = "nf4-gpu-day"


class Day:
    """The stages, what became of them, and the summary."""

    def __init__(self, stages: Sequence[Stage], folder: Path, title: str, seconds: float) -> None:
        self.stages, self.folder, self.title, self.limit = stages, folder, title, seconds
        self.date = datetime.now(UTC).isoformat(timespec="seconds")
        self.results = {
            s.name: Result(s.name, "left out" if s.left_out else "not run", found=s.left_out)
            for s in stages
        }

    def run(self, begin: float, cpu: bool = False) -> int:
        """Run all stages and return the exit status.

        Each has its share of the day, and what those before it left of theirs.

        Args:
            begin: of the day, by `time.monotonic`.
            cpu: whether to hide the GPUs.

        Returns:
            0 if every stage but those left out ran and succeeded, otherwise 1.
        """
        self._note([])
        (self.folder / "logs").mkdir()
        wanted = [stage for stage in self.stages if not stage.left_out]
        waves = [list(same) for _, same in groupby(wanted, key=lambda s: s.wave or s.name)]
        shares = [max(stage.seconds for stage in wave) for wave in waves]
        for i, wave in enumerate(waves):
            end = begin + self.limit * sum(shares[: i + 1]) / sum(shares)
            self._run_wave(wave, end - time.monotonic(), cpu)
        results = [r.result for r in self.results.values() if r.result != "left out"]
        return 0 if results and set(results) == {"ok"} else 1

    def _run_wave(self, wave: Sequence[Stage], limit: float, cpu: bool) -> None:
        names = [stage.name for stage in wave]
        if limit < 1:
            self._note([Result(n, "not run", found="its time was spent") for n in names])
            return
        self._note([Result(name, "running") for name in names])
        say(f"{', '.join(names)} (at most {limit:.0f} s)")
        try:
            self._note(run_wave(wave, self.folder, limit, cpu))
        except KeyboardInterrupt:
            self._note([Result(name, "interrupted") for name in names])
            raise
        for name in names:
            r = self.results[name]
            say(f"  {name}: {r.result}, {r.seconds:.0f} s: {r.found}")

    def _note(self, results: Sequence[Result]) -> None:
        """Keep results and write the summary."""
        self.results.update({r.stage: r for r in results})
        rows = [asdict(r) for r in self.results.values()]
        found = {"title": self.title, "date": self.date, "seconds": self.limit, "stages": rows}
        lines = [f"# {self.title}", "", self.date, "", "| stage | result | seconds | found |"]
        lines.append("|---|---|---|---|")
        for r in self.results.values():
            status = f", status {r.status}" if r.result == "failed" and r.status else ""
            cells = (r.stage, r.result + status, f"{r.seconds:.1f}", r.found.replace("|", "\\|"))
            lines.append(f"| {' | '.join(cells)} |")
        _write(self.folder / "summary.md", "\n".join(lines) + "\n")
        _write(self.folder / "summary.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Write beside path and rename, as nf4.tools.paths does, which needs PyTorch to be imported."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201  the day takes minutes: say where it is


def make_folder(asked: str | None) -> Path:
    """Make the folder for results and return its absolute path.

    Args:
        asked: must not exist; None for `FOLDER`, or the next free number.

    Raises:
        ValueError: there is something at it.
        OSError: it cannot be made.
    """
    number, path = 1, Path(FOLDER if asked is None else asked)
    while os.path.lexists(path):
        if asked is not None:
            raise ValueError(f"out: expected a folder that does not exist yet, {path} does")
        number += 1
        path = Path(f"{FOLDER}-{number}")
    path.mkdir(parents=True)
    return path.resolve()


def find_gpu() -> str:
    """Return the GPU's name.

    Raises:
        ValueError: PyTorch cannot be imported, or finds none.
    """
    code = "import torch; print(torch.cuda.is_available() and torch.cuda.get_device_name() or '')"
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise ValueError("expected a GPU, PyTorch did not answer within 120 s") from None
    if done.returncode:
        last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise ValueError(f"expected a Python that imports torch, {sys.executable} says {last}")
    name = done.stdout.strip()
    if not name:
        raise ValueError("expected a GPU, PyTorch finds none (--device cpu makes a trial without)")
    return name.splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the day.

    Args:
        arguments: as on the command line, without the program's name; ``sys.argv`` by default.

    Returns:
        0 if all stages that could be run succeeded, 1 if not, 2 after an error of the user's, which
        is one line on stderr, 130 if interrupted.
    """
    begin = time.monotonic()
    options = _parser().parse_args(arguments)
    if options.list:
        for name, (seconds, what) in GROUPS.items():
            say(f"{name:12} {seconds:4} s  {what}")
        return 0
    try:
        if not options.seconds >= 10:
            raise ValueError(f"seconds: expected at least 10, got {options.seconds:g}")
        cpu = options.device == "cpu"
        title = "GPU day: a trial without a GPU" if cpu else f"GPU day: {find_gpu()}"
        folder = make_folder(options.out)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"gpu_day: {error}\n")
        return 2
    stages = [s for s in plan(folder, options.device) if s.group in (options.stages or GROUPS)]
    try:
        status = Day(stages, folder, title, options.seconds).run(begin, cpu)
    except KeyboardInterrupt:
        status = 130
    say(f"{folder / 'summary.md'}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_day", description="Run everything that needs a GPU.")
    parser.add_argument(
        "--out", help=f"folder to make, must not exist (default: {FOLDER}, or the next free number)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"for all of it (default: {SECONDS})"
    )
    parser.add_argument("--stages", nargs="+", choices=GROUPS, metavar="STAGE", help="see --list")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a trial without a GPU, at tiny sizes (default: cuda)",
    )
    parser.add_argument("--list", action="store_true", help="list the stages and end")
    return parser


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupted)
    sys.exit(main())
