"""Every kernel against its reference: the same signature, the same results without a GPU."""

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="nf4's kernels need Triton")

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(p.stem for p in (ROOT / "kernels").glob("[a-z]*.py"))
OLDEST = ROOT / ".venv" / "triton-3.6"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("op", OPS)
def test_kernel_has_the_signature_of_its_reference(op) -> None:
    kernel, reference = (
        inspect.signature(getattr(import_module(f"{package}.{op}"), op))
        for package in ("nf4.kernels", "nf4.reference")
    )
    assert kernel == reference


@pytest.mark.parametrize(
    "op", ["quantize", "quantize_mse", "quantize_absmax", "dequantize", "repack"]
)
def test_operator_takes_the_kernel_on_a_gpu(op) -> None:
    from nf4.ops.registry import implementation

    assert implementation(op, "cuda").__module__ == f"nf4.kernels.{op}"


def run_tests(*arguments: str, **environment: str) -> None:
    """Run pytest in a process of its own; every test must pass and none be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-cov", "-p", "no:xdist", *arguments]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    environment = {**inherited, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout and "passed" in done.stdout


FILES = [f"tests/kernels/test_{op}.py" for op in OPS]


@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
def test_kernels_match_their_references_in_the_interpreter() -> None:
    run_tests("-m", "kernel", *FILES, TRITON_INTERPRET="1")


oldest = pytest.mark.skipif(
    INTERPRETED or not OLDEST.is_dir() or str(OLDEST) in triton.__file__,
    reason="needs the oldest supported Triton in .venv/triton-3.6, where make test puts it",
)


@oldest
def test_kernels_match_their_references_in_the_oldest_interpreter() -> None:
    few = "not 32 and not 512 and not 4096 and not float16 and not 30 and not bfloat16-double"
    run_tests("-m", "kernel", "-k", few, *FILES, PYTHONPATH=str(OLDEST), TRITON_INTERPRET="1")


@oldest
def test_kernels_match_their_references_compiled_by_the_oldest_triton() -> None:
    few = "ptx and sm_90 and not wrong and not every_tile"
    run_tests("-k", few, *FILES, PYTHONPATH=str(OLDEST))


@oldest
def test_kernels_compile_with_the_oldest_triton() -> None:
    few = "compiles and (sm_90 or gfx942 and not matmul_small)"
    run_tests("-k", few, "tests/kernels/test_compiled.py", PYTHONPATH=str(OLDEST))
