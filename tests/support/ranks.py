"""Run a worker of tests/distributed in several processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from helpers import error
from torch import Tensor


def clean_environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that a test starts: no coverage, one thread."""
    left = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    return {**left, "OMP_NUM_THREADS": "1", **more}


def torchrun(count: int, *arguments: Any, restarts: int = 0) -> subprocess.CompletedProcess:
    """Run a script, or ``-m`` and a module, in several processes, and return how that ended."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *launcher, f"--max-restarts={restarts}", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=clean_environment()
    )


def run(worker: ModuleType, task: str, kind: str, folder: Path, ranks: int = 2) -> list[dict]:
    """Return what each rank has found.

    Args:
        worker: whose ``TASKS`` has the task.
        task: what each process does.
        kind: of it, or a path.
        folder: to make, for what comes of it.
        ranks: number of processes.
    """
    return run_all(worker, task, [kind], folder, ranks)[kind]


def run_all(
    worker: ModuleType, task: str, kinds: Sequence[str], folder: Path, ranks: int = 2
) -> dict[str, list[dict]]:
    """Return what each rank has found, of each kind: to start processes takes longer than most."""
    folder.mkdir()
    done = torchrun(ranks, worker.__file__, task, ",".join(kinds), folder)
    assert done.returncode == 0, done.stderr[-4000:]
    of_ranks = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    return {kind: [found[i] for found in of_ranks] for i, kind in enumerate(kinds)}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-4) -> None:
    """Hold gradients to those of one process; sums are in another order."""
    assert found.keys() == expected.keys() and found
    for name, grad in expected.items():
        assert error(found[name], grad) < bound, name
