"""Every kernel without a GPU: run in Triton's interpreter, and compiled for seven GPUs."""

import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="nf4's kernels need Triton")

from nf4.cli import main  # noqa: E402
from nf4.kernels import _aot, _report  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(p.stem for p in (ROOT / "kernels").glob("[a-z]*.py"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")


def run_kernel_tests(*arguments: str, **environment: str) -> str:
    """Run the kernels' test files in a process of its own; return what pytest printed."""
    files = [f"tests/test_{op}.py" for op in OPS]
    command = [sys.executable, "-m", "pytest", "-q", "--no-cov", *arguments, *files]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    environment = {**inherited, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout and "passed" in done.stdout
    return done.stdout


@needs_compiler
def test_kernels_match_their_references_in_the_interpreter() -> None:
    run_kernel_tests("-m", "kernel", TRITON_INTERPRET="1")


OLDEST = ROOT / ".venv" / "triton-3.6"
needs_oldest = pytest.mark.skipif(
    INTERPRETED or not OLDEST.is_dir() or "triton-3.6" in _aot.triton.__file__,
    reason="needs the oldest supported Triton in .venv/triton-3.6, where make test puts it",
)


@needs_oldest
def test_kernels_match_their_references_with_the_oldest_triton() -> None:
    oldest = {"PYTHONPATH": str(OLDEST)}
    run_kernel_tests("-k", "ptx or compiles", "tests/test_kernels.py", **oldest)
    run_kernel_tests("-m", "kernel", "-k", "not 512 and not 4096", **oldest, TRITON_INTERPRET="1")


@pytest.mark.parametrize("op", OPS)
def test_kernel_has_the_signature_of_its_reference(op) -> None:
    kernel, reference = (
        inspect.signature(getattr(import_module(f"{package}.{op}"), op))
        for package in ("nf4.kernels", "nf4.reference")
    )
    assert kernel == reference


# Instructions per weight on sm_90. The design asks for 7 and 17 for whole bf16 tensors in blocks of
# 64; the other figures are what was reached, rounded up.
BUDGETS = {
    "dequantize, block 64, bf16": 7.0,
    "dequantize, block 64, bf16, masked": 7.0,
    "dequantize, block 64, bf16, odd count": 20.0,
    "dequantize, block 64, fp32": 7.0,
    "dequantize, block 4096, bf16": 7.0,
    "quantize, block 64, bf16": 17.0,
    "quantize, block 64, bf16, masked": 22.0,
    "quantize, block 64, bf16, odd count": 33.0,
    "quantize, block 64, fp32": 20.0,
    "quantize, block 4096, bf16": 17.0,
    "quantize_absmax, sum": 45.0,
    "quantize_absmax, codes": 220.0,
}


@needs_compiler
@pytest.mark.parametrize("variant", _report.variants(), ids=lambda v: v.name)
def test_kernel_compiles_for_every_gpu_without_spills(variant) -> None:
    for target in _aot.TARGETS:
        found = _aot.report(variant, target)
        assert found.spills == 0, target
        if target == "sm_90":
            assert found.instructions <= BUDGETS[variant.name]
            if variant.name.startswith("dequantize") and not variant.odd:
                assert found.memory["STG.128"] and not found.memory["STG.32"], found.memory


@needs_compiler
def test_bench_compile_prints_a_row_for_each_kernel(capsys) -> None:
    assert main(["bench", "--compile", "--target", "sm_90"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(_report.variants())
    assert lines[2].startswith("| quantize, block 64, bf16 | sm_90 | 4 | ")
    assert main(["bench", "--compile", "--target", "gfx942", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["target"] for row in rows} == {"gfx942"}
    assert all(row["report"]["spills"] == 0 for row in rows)
    assert main(["bench", "--compile", "--target", "sm_1"]) == 2
    message = capsys.readouterr().err
    assert (
        message.startswith("nf4 bench: target: expected one of sm_80") and message.count("\n") == 1
    )


def test_operators_take_the_kernel_on_a_gpu() -> None:
    from nf4.operators import implementation

    for op in OPS:
        assert implementation(op, "cuda").__module__ == f"nf4.kernels.{op}"
