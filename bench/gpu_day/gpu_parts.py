"""The stages of a GPU day that no other command does.

python bench/gpu_day/gpu_parts.py environment    # what the machine is, as JSON
python bench/gpu_day/gpu_parts.py draw FILE FOLDER  # what `nf4 bench` measured, as pictures
python bench/gpu_day/gpu_parts.py launch  # every operator, small: what compute-sanitizer looks at
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("torch", "triton", "numpy", "numba", "transformers", "peft", "bitsandbytes", "torchao")
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def environment() -> dict[str, Any]:
    """Return GPU, driver, versions and commit; what nvidia-smi prints goes to stderr."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    sys.stderr.write(f"{_printed('nvidia-smi') or 'nvidia-smi: not here'}\n")
    changed = _printed("git", "status", "--porcelain")
    return {
        "device": gpu and gpu.name,
        "memory_bytes": gpu and gpu.total_memory,
        "multiprocessors": gpu and gpu.multi_processor_count,
        "capability": gpu and f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "nvidia_smi": _printed("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": versions,
        "commit": _printed("git", "rev-parse", "HEAD"),
        "changed_files": None if changed is None else changed.splitlines(),
    }


def _printed(*command: str) -> str | None:
    """Return what a command prints; None if it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=15)
    return done.stdout.rstrip() if done.returncode == 0 else None


def draw(file: str, folder: str) -> list[str]:
    """Draw all measurements of a file together and return the names of the pictures."""
    from nf4.bench.harness import plots, results

    return [path.name for path in plots.draw(results.read(Path(file)), Path(folder))]


def launch() -> int:
    """Run every operator, forwards and backwards, on a whole, a ragged and an odd weight.

    Returns:
        How many results were looked at.

    Raises:
        ValueError: one is not finite.
    """
    import nf4

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: list[Tensor] = []
    for n, k in ((256, 512), (96, 130), (7, 33)):
        w = torch.randn(n, k, dtype=torch.bfloat16, device=device)
        results += [nf4.dequantize(nf4.quantize(w, scale=s)) for s in nf4.ops.checks.SCALES]
        q = nf4.quantize(w)
        if nf4.tensor.fits_fragments(q.shape, q.block_size):
            q = nf4.to_fragments(q)
            results += [nf4.dequantize(q), nf4.dequantize(nf4.to_rows(q))]
        a, b = (torch.randn(s, device=device, requires_grad=True) for s in ((8, k), (n, 8)))
        for rows in (1, 17, 100, 600):  # each way of multiplying
            x = torch.randn(rows, k, dtype=w.dtype, device=device, requires_grad=True)
            y = nf4.linear(x, q)
            results += [y, *torch.autograd.grad(y.sum(), [x])]
            y = nf4.lora_linear(x, q, a, b, 2.0, dropout_p=0.25)
            results += [y, *torch.autograd.grad(y.sum(), [x, a, b])]
    finite = [bool(result.isfinite().all()) for result in results]
    if not all(finite):
        raise ValueError(f"expected finite results, got {finite.count(False)} others")
    return len(results)


if __name__ == "__main__":
    parts: dict[str, Callable[..., Any]] = {
        "environment": environment,
        "draw": draw,
        "launch": launch,
    }
    done = parts[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(done, indent=1))  # noqa: T201  a stage's output
