"""Under what circumstances something was measured: device, driver, versions, commit, date."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nf4.bench.harness.asked import FOLDER as FOLDER

OURS = ("nf4", "torch", "triton", "numba", "transformers", "peft")
PACKAGES = (*OURS, "bitsandbytes", "torchao", "gemlite", "kernels")
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))
# What a run writes itself makes no tree dirty
WRITTEN = (":!bench/results", ":!bench/README.md")


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return what a later reader must know of a run on a device.

    Returns:
        ``device``; ``driver``, of a GPU, or None; ``threads`` of PyTorch on a CPU, or None;
        ``load``, what ran or waited to run on the machine in the last minute, on average, or None;
        ``versions`` by package; ``commit``, None outside a checkout; ``dirty``, whether tracked
        files differed from it; ``date`` in UTC.
    """
    gpu = device.type == "cuda"
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    commit, dirty = _commit()
    return {
        "device": device_name(device),
        "driver": _driver() if gpu else None,
        "threads": None if gpu else torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of a CPU and how many of its threads PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def slug(name: str) -> str:
    """Return a device's name as a file's: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    """Return the version of a GPU's driver, as Linux tells it."""
    for file in DRIVERS:
        if file.is_file():
            found = re.search(r"\d+(\.\d+)+", file.read_text(encoding="utf-8"))
            return found[0] if found else None
    return None


def _commit() -> tuple[str | None, bool]:
    """Return the commit of the checkout, and whether its tracked files differ from it."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != FOLDER.parent:
        return None, False  # another project's checkout, which has this one's environment in it
    changed = _git("-C", top, "status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN)
    return _git("rev-parse", "--short", "HEAD"), bool(changed)


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(FOLDER), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
