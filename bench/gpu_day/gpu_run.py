"""Run commands beside each other, with a limit of time, and say what became of them."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_stages import ROOT, Stage

GRACE = 6.0  # seconds from an interrupt, on which pytest still sums up, to the kill
LONGEST = 300  # characters of what was found


@dataclass
class Result:
    """What became of a stage.

    Attributes:
        stage: its name.
        result: "ok", "failed", "timed out", "left out", "not run", "running" or "interrupted".
        status: of the process, negative for a signal; None while there is none.
        seconds: that it took.
        found: one line on what was found, or why there is nothing.
    """

    stage: str
    result: str
    status: int | None = None
    seconds: float = 0.0
    found: str = ""


class Running:
    """A stage's process, in a process group of its own."""

    def __init__(self, stage: Stage, folder: Path, cpu: bool) -> None:
        self.stage, self.folder = stage, folder
        self.log = folder / "logs" / f"{stage.name}.txt"
        self.printed = self.log.with_suffix(".out") if stage.output else self.log
        self.begin, self.seconds = time.monotonic(), 0.0
        self.process: subprocess.Popen[bytes] | None = None
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",  # what a process wrote before it was killed is kept
            "HF_HUB_OFFLINE": "1",
            **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {}),
            **stage.environment,
        }
        with self.log.open("wb") as log, self.printed.open("ab") as printed:
            try:
                self.process = subprocess.Popen(
                    stage.command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=printed,
                    stderr=log if stage.output else subprocess.STDOUT,
                    process_group=0,
                )
            except OSError as error:
                log.write(f"{error}\n".encode())

    def runs(self) -> bool:
        """Whether the process has not ended yet."""
        if self.process is None or self.process.poll() is not None:
            self.seconds = self.seconds or time.monotonic() - self.begin
            return False
        return True

    def interrupt(self) -> None:
        """Ask the process to end; what it started is its own to end."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Kill the process and all that it started."""
        if self.process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def result(self, in_time: bool) -> Result:
        """Return what became of it, and put what it printed in its place."""
        found = self._found()
        status = None if self.process is None else self.process.returncode
        seconds = round(self.seconds or time.monotonic() - self.begin, 1)
        result = ("ok" if status == 0 else "failed") if in_time else "timed out"
        if self.stage.output:
            if not self.printed.stat().st_size:
                self.printed.unlink()
            elif in_time:
                self.printed.replace(self.folder / self.stage.output)
        return Result(self.stage.name, result, status, seconds, found)

    def _found(self) -> str:
        found = ""
        with suppress(ValueError, LookupError, TypeError, AttributeError, OSError):
            found = self.stage.found(self.printed.read_text(encoding="utf-8", errors="replace"))
        if not found:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            found = next((line for line in reversed(lines) if line.strip()), "")
        return " ".join(found.split())[:LONGEST]


def run_wave(stages: Sequence[Stage], folder: Path, limit: float, cpu: bool) -> list[Result]:
    """Run stages beside each other and return what became of them.

    What still runs after `limit` seconds is interrupted, and after `GRACE` more killed, with all
    that it started and that is still in its process group. So is what an ended stage left running.
    """
    running: list[Running] = []
    try:
        for stage in stages:
            running.append(Running(stage, folder, cpu))
        _wait(running, limit)
        late = [one for one in running if one.runs()]
        for one in late:
            one.interrupt()
        _wait(late, GRACE)
    finally:
        for one in running:
            one.kill()
    _wait(running, GRACE)
    return [one.result(in_time=one not in late) for one in running]


def _wait(running: Sequence[Running], limit: float) -> None:
    end = time.monotonic() + limit
    while [one for one in running if one.runs()] and time.monotonic() < end:
        time.sleep(0.05)
