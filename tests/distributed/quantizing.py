"""What processes do in tests of quantizing by several of them.

``quantizing.py kill RANK STEP SOURCE TARGET`` is ``nf4 quantize`` by torchrun, in which one process
kills itself. ``quantizing.py fork FOLDER JOBS`` forks the processes of jobs, one job after another,
which have no launcher that would end them, and prints what came of each.
"""

import json
import os
import resource
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import nf4
import nf4.tools.job
from nf4.commands.cli import main


class Steps:
    """Count what this process does with files of a folder, and kill it at a step.

    Args:
        folder: where.
        last: at which step; 0 for never.
    """

    def __init__(self, folder: str, last: int) -> None:
        self.folder, self.last, self.count = folder, last, 0
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event != "open" and not event.startswith(("os.", "shutil.")):
            return
        if self.folder in str(arguments):
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def quantize(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Quantize as one process of a job; return what came of it."""
    killed, last = job.get("kill", (-1, 0))
    steps = Steps(str(Path(job["target"]).parent), last if rank == killed else 0)
    if rank == job.get("full_disk"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    options = job.get("options", {}) | job.get("own", {}).get(str(rank), {})
    seen: list[Any] = []
    found: dict[str, Any] = {"progress": seen}
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            made = nf4.quantize_checkpoint(
                job["source"], job["target"], progress=lambda *n: seen.append(n), **options
            )
            found["made"] = [made.layers, made.bytes_before, made.bytes_after]
        except (ValueError, TypeError, OSError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
    if rank == job.get("full_disk"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return found | {"steps": steps.count, "warnings": [str(w.message) for w in given]}


def fork(job: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Fork the processes of a job; return what came of each, and the signal that ended it."""
    named = {"WORLD_SIZE": job["count"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nf4.tools.job.TIMEOUT = job.get("timeout", 60.0)
    ranks = {}
    for rank in range(job["count"]):
        (folder / f"{rank}.json").unlink(missing_ok=True)
        if rank in job.get("absent", ()):
            continue
        pid = os.fork()
        if not pid:
            os.environ |= {k: str(v) for k, v in (named | {"RANK": rank}).items()}
            found = quantize(job, rank)
            (folder / f"{rank}.json").write_text(json.dumps(found))
            os._exit(0)
        ranks[pid] = rank
    ended: dict[int, int] = {}
    while len(ended) < len(ranks):
        pid, status = os.wait()
        ended[ranks[pid]] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if ended[ranks[pid]] and job.get("end_others", True):  # as torchrun does
            for other, rank in ranks.items():
                if rank not in ended:
                    os.kill(other, signal.SIGTERM)
    return [
        {"signal": ended.get(rank), **(json.loads(file.read_text()) if file.exists() else {})}
        for rank, file in ((n, folder / f"{n}.json") for n in range(job["count"]))
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)  # so that a fork has all of its threads
    if sys.argv[1] == "kill":
        killed, step, source, target = sys.argv[2:]
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and os.environ["RANK"] == killed:
            Steps(str(Path(target).parent), int(step))
        sys.exit(main(["quantize", source, target]))
    import transformers.modeling_utils  # noqa: F401  once, and not in each process

    nf4.quantize(torch.ones(64, 64))  # which imports a kernel, or what there is in its place
    jobs = json.loads(sys.argv[3])
    sys.stdout.write(json.dumps([fork(job, Path(sys.argv[2])) for job in jobs]))
