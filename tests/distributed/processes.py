"""Start processes that train together, without a launcher: how each of them ends is seen."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds that a rank waits for another one
HANG = 300  # seconds after which a test gives up


def start(script: Any, folder: Path, ranks: int, *arguments: str) -> list[subprocess.Popen]:
    """Start a module as the script of each rank; results are to go to a folder."""
    folder.mkdir()
    from ranks import clean_environment  # of tests: no module of a rank

    kept = clean_environment(WORLD_SIZE=str(ranks))
    command = [sys.executable, script.__file__, str(folder), *arguments]
    return [
        subprocess.Popen(command, env=kept | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Wait for all, and return the status of each and what it wrote of its errors."""
    try:
        errors = [process.communicate(timeout=HANG)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, error) for p, error in zip(processes, errors, strict=True)]


def run(script: Any, folder: Path, ranks: int, *arguments: str) -> list[Any]:
    """Return what each rank has found, of which all must end well."""
    for status, error in ends(start(script, folder, ranks, *arguments)):
        assert status == 0, error[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def main(task: Callable[..., Any]) -> None:
    """Do what a rank does: ``task(rank, ranks, *arguments)``, and keep what it returns."""
    folder, *arguments = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT),
    )
    try:
        torch.save(task(rank, ranks, *arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
        status = 0
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        status = 1
    # At its end an interpreter may be aborted by threads of gloo, of which fully_shard leaves some
    os._exit(status)
