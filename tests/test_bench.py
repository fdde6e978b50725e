"""Every benchmark runs on tiny sizes, here without a GPU, and refuses to time a wrong result."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import nf4

triton = pytest.importorskip("triton", reason="nf4's kernels need Triton")

BENCH = Path(__file__).resolve().parents[1] / "bench"
SCRIPTS = sorted(BENCH.glob("bench_*.py"))
TINY = ["--shapes", "64x128", "--rounds", "1"]
ROWS = {"bench_matmul", "bench_matmul_small", "bench_qlora_step", "bench_lora_down"}


@pytest.fixture
def run(monkeypatch):
    """Run a script with arguments, as from the shell."""
    monkeypatch.syspath_prepend(str(BENCH))

    def run(script: Path, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_bench_prints_a_table_and_writes_a_file(script, run, capsys, tmp_path) -> None:
    more = ["--rows", "3"] if script.stem in ROWS else []
    run(script, *TINY, *more, "--out", str(tmp_path / "found.json"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("## ") and lines[2].count(";") == 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"] and found["versions"]["torch"] == torch.__version__ and found["date"]
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]
    timings = [t for result in found["results"] for t in result["timings"].values()]
    assert len(lines) == 7 + len(timings) and lines[-1] == ""
    assert all("nf4" in result["timings"] for result in found["results"])
    assert all(0 < t["p20"] <= t["median"] <= t["p80"] for t in timings)


def test_bench_times_bitsandbytes(run, capsys, bnb) -> None:
    for op in ("quantize", "dequantize", "matmul", "qlora_step"):
        run(BENCH / f"bench_{op}.py", *TINY)
        assert "| bitsandbytes" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["quantize", "dequantize", "matmul"])
def test_bench_refuses_to_time_a_wrong_result(op, run, monkeypatch, capsys) -> None:
    quantize, linear = nf4.quantize, nf4.linear
    if op == "matmul":
        monkeypatch.setattr(nf4, "linear", lambda *args: 1.01 * linear(*args))
    elif op == "dequantize":
        monkeypatch.setattr(nf4, "dequantize", lambda q: torch.zeros(q.shape, dtype=q.dtype))
    else:
        monkeypatch.setattr(nf4, "quantize", lambda w: quantize(-w))
    with pytest.raises(ValueError, match="not timed"):
        run(BENCH / f"bench_{op}.py", *TINY)
    assert capsys.readouterr().out == ""


def test_bench_refuses_a_shape_that_is_none(run, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(BENCH / "bench_quantize.py", "--shapes", "4096")
    assert "expected NxK such as 4096x4096, got 4096" in capsys.readouterr().err


def test_host_cost_measures_each_call_and_puts_the_operators_back(run, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import host_cost

    rows = dict(host_cost.rows(calls=20))
    assert rows["nf4.dequantize"] > 0 and rows["nf4.linear, M = 1"] > 0
    q = nf4.quantize(torch.ones(64))
    assert torch.equal(nf4.dequantize(q), torch.ones(64))


def test_modelled_figures_are_the_committed_ones(run, capsys) -> None:
    run(BENCH / "modelled.py")
    page = capsys.readouterr().out
    assert page.startswith("# Modelled for an H200, not measured\n")
    committed = (BENCH / "results" / "modelled-h200.md").read_text(encoding="utf-8")
    if f"Triton {triton.__version__}" not in committed:
        pytest.skip("the committed page counts what another Triton compiled")
    assert page == committed
