"""`make test`: every stage runs, and one that fails makes the whole fail."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="make and sh are those of Unix")

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["ruff check .", "ruff format --check .", "mypy", "not alone", "-m alone", "--nbmake"]
# Takes the place of the environment's Python: writes down what it is to run, and fails where told
PYTHON = """#!/bin/sh
echo "$@" >> stages.log
case "$*" in *"$FAILS"*) exit 1;; esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("fails", ["nothing", "mypy", "not alone", "-m alone", "--nbmake"])
def test_make_test_runs_every_stage(fails, tmp_path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".ci").mkdir()
    for name in ("pyproject.toml", "setup.py", ".ci/constraints.txt"):
        (tmp_path / name).touch()
    for folder in ("nf4", "kernels", "bench"):
        (tmp_path / folder).mkdir()
    for name in ("nf4/kernels.py", "nf4/bench.py"):
        (tmp_path / name).touch()
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "env" / ".ready").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "test", "VENV=env"],
        cwd=tmp_path,
        env={**environment, "FAILS": fails, "PATH": f"{tmp_path / 'env/bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    lines = (tmp_path / "stages.log").read_text().splitlines()
    found = [next(stage for stage in STAGES if stage in line) for line in lines]
    assert found == STAGES, done.stdout + done.stderr
    assert (done.returncode == 0) == (fails == "nothing")
