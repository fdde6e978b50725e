"""Benchmarks run on tiny sizes, here without a GPU, and refuse to time a wrong result."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nf4
import nf4.commands.cli
from nf4.bench.harness import ceilings, footprint, measure, peers, results, run
from nf4.bench.harness import request as requests
from nf4.bench.harness.cases import Case, Options
from nf4.bench.harness.measure import Timing
from nf4.commands.cli import main

triton = pytest.importorskip("triton", reason="nf4's kernels need Triton")

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--shapes", "3x64x128", "--ranks", "16", "--rounds", "1"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Measure small ceilings, which vary, and empty no large cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CPU_COPY", 1 << 20), ("CPU_SIZE", 64), ("TRIAL_SIZE", 32)):
            patch.setattr(ceilings, name, value)
        for module in (ceilings, measure):
            patch.setattr(module, "cpu_cache", lambda: 1 << 18)
        patch.setattr(measure, "FALL_ASLEEP", 0.0)
        patch.setattr(run, "DISTURBED", 1e9)
        yield


@pytest.fixture
def bench(tmp_path, capsys):
    """Run the command into a file, and return its status, output, complaints and the file."""

    def bench(*arguments: str) -> SimpleNamespace:
        out = tmp_path / "found.json"
        status = main(["bench", *arguments, "--out", str(out)])
        printed = capsys.readouterr()
        found = json.loads(out.read_text()) if out.exists() else None
        errors = [line for line in printed.err.splitlines() if "━" not in line and line.strip()]
        return SimpleNamespace(status=status, out=printed.out, errors=errors, found=found, path=out)

    return bench


def test_bench_measures_every_op(tmp_path) -> None:
    one = {"shapes": ["3x64x128"], "ranks": [16], "dtypes": ["bf16"], "rounds": 1}
    outcome = run.run(run.plan(requests.Request(**one, device="cpu"), str(tmp_path / "found.json")))
    assert outcome.refused == {} and not outcome.wrong
    assert list(tmp_path.iterdir()) == [outcome.path]
    found = results.read(outcome.path)
    kernels = {p.stem for p in (ROOT / "kernels").glob("[a-z]*.py")}
    assert tuple(found.sections) == requests.OPS and kernels < set(requests.OPS)
    for op, own in found.sections.items():
        assert own.rows, op
        around = own.circumstances
        assert around["device"] == found.device and around["versions"]["torch"] == torch.__version__
        assert around["date"].endswith("+00:00") and around["threads"] == torch.get_num_threads()
        assert own.ceilings.copy > 0 and set(own.ceilings.products) == {"bf16", "fp32"}
        for row in own.rows:
            assert next(iter(row.timings)).startswith("nf4") and row.modelled is None
            assert row.absent == {}, op
            limit = own.ceilings.products[row.dtype]
            assert row.ceiling == pytest.approx(
                1e6 * max(row.moved / own.ceilings.copy, row.flops / limit)
            )
            for t in row.timings.values():
                assert 0 < t.least <= t.p20 <= t.median <= t.p80 and t.rounds == 1
                assert t.cpu > 0 and t.peak >= 0 and t.launches is None and t.host is None
    names = {op: list(own.rows[0].timings) for op, own in found.sections.items()}
    assert names["dequantize"][:2] == ["nf4", "nf4, out="]
    assert names["lora_down"][0] == "nf4's reference", "no kernel ran"
    passes = [row.labels["pass"] for row in found.sections["qlora_step"].rows]
    assert passes == ["forward", "step"]


def test_bench_prints_tables_and_names_its_file(bench) -> None:
    done = bench("repack", *TINY)
    assert done.status == 0 and done.errors == [str(done.path)]
    rows = done.found["sections"]["repack"]["rows"]
    timings = [t for row in rows for t in row["timings"].values()]
    lines = done.out.splitlines()
    assert lines[0] == f"## {done.found['device']}" and "### repack" in lines
    table = [line for line in lines if line.startswith("|")]
    assert len(timings) == 4 and len(table) == 2 + len(timings)
    assert "time / ours" in table[0] and "TFLOP/s" not in table[0], "empty columns are left out"


def test_bench_says_when_the_machine_is_disturbed(bench, monkeypatch) -> None:
    monkeypatch.setattr(run, "DISTURBED", 0.5)
    done = bench("quantize_absmax", *TINY)
    assert done.status == 0 and "something else is at work on this machine" in done.errors[0]


def test_ceilings_are_the_fastest_calls(monkeypatch) -> None:
    def interleaved(functions, device, rounds, small) -> dict[str, Timing]:
        assert list(functions) == ["copy", "bf16"] and rounds == ceilings.ROUNDS
        for function in functions.values():
            function()
        return {"copy": Timing(3, 2, 4, 1.0, 10), "bf16": Timing(30, 20, 30, 10.0, 10)}

    monkeypatch.setattr(ceilings, "interleaved", interleaved)
    found = ceilings.measure_ceilings(CPU, ["bf16", "bf16"])
    size = ceilings.CPU_SIZE if found.products["bf16"] > 1e10 else ceilings.TRIAL_SIZE
    assert found.copy == pytest.approx((1 << 20) / 1e-6) and found.spread == 2.0
    assert found.products["bf16"] == pytest.approx(2 * size**3 / 1e-5)
    assert found.microseconds(2 * found.copy, 0, "bf16") == pytest.approx(2e6)
    assert found.microseconds(1, 3 * found.products["bf16"], "bf16") == pytest.approx(3e6)


def test_bench_prints_json(bench) -> None:
    done = bench("repack", *TINY, "--json")
    assert json.loads(done.out) == done.found


def test_bench_times_bitsandbytes(bench, bnb) -> None:
    done = bench("quantize", "dequantize", "matmul", "qlora_step", *TINY)
    for op, own in done.found["sections"].items():
        names = [name for row in own["rows"] for name in row["timings"]]
        assert any(name.startswith("bitsandbytes") for name in names), op


def test_importing_bitsandbytes_prints_nothing() -> None:
    code = "from nf4.bench.harness import peers; print(peers.bitsandbytes().__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("bitsandbytes\n", "")


@pytest.mark.parametrize("op", ["quantize", "dequantize", "matmul"])
def test_bench_refuses_to_time_a_wrong_result(op, bench, monkeypatch) -> None:
    quantize, linear, dequantize = nf4.quantize, nf4.linear, nf4.dequantize
    if op == "matmul":
        monkeypatch.setattr(nf4, "linear", lambda *args: 1.01 * linear(*args))
    elif op == "dequantize":
        wrong = lambda q, out=None: dequantize(q) if out is None else out.zero_()  # noqa: E731
        monkeypatch.setattr(nf4, "dequantize", wrong)
    else:
        monkeypatch.setattr(nf4, "quantize", lambda w: quantize(-w))
    done = bench(op, *TINY)
    assert done.status == 1 and done.out == "" and done.found is None
    (line,) = done.errors
    assert line.startswith(f"nf4 bench: {op}: ") and line.endswith("not timed")


def test_bench_measures_the_other_ops_when_one_is_refused(bench, monkeypatch) -> None:
    linear = nf4.linear
    monkeypatch.setattr(nf4, "linear", lambda *args: 1.01 * linear(*args))
    done = bench("matmul", "repack", *TINY)
    assert done.status == 1 and list(done.found["sections"]) == ["repack"]


def test_bench_says_which_op_does_not_take_a_shape(bench) -> None:
    done = bench("repack", "quantize", "--device", "cpu", "--shapes", "10x128", "--rounds", "1")
    assert done.status == 2 and list(done.found["sections"]) == ["quantize"]
    assert "nf4 bench: repack: " in done.errors[-1] and "N a multiple of 16" in done.errors[-1]


def test_a_new_run_replaces_only_what_it_measured(bench) -> None:
    first = bench("repack", "quantize_absmax", *TINY).found["sections"]
    second = bench("repack", *TINY[:-1], "2").found["sections"]
    assert second["quantize_absmax"] == first["quantize_absmax"]
    assert second["repack"]["options"]["rounds"] == 2


def test_rows_of_a_shape_and_of_the_rest(bench) -> None:
    shapes = ["3x64x128", "5x64x128", "64x64"]
    options = ["--device", "cpu", "--dtypes", "fp32", "--rounds", "1"]
    done = bench("matmul_small", "--shapes", *shapes, *options)
    labels = [row["labels"] for row in done.found["sections"]["matmul_small"]["rows"]]
    assert [(found["W"], found["M"]) for found in labels] == [
        ("64×128", "3"),
        ("64×128", "5"),
        ("64×64", "1"),
        ("64×64", "4"),
        ("64×64", "16"),
    ]


def test_threads_are_set_for_the_run_only(bench) -> None:
    before = torch.get_num_threads()
    done = bench("quantize_absmax", *TINY, "--threads", str(before + 1))
    around = done.found["sections"]["quantize_absmax"]["circumstances"]
    assert around["threads"] == before + 1 and f"{before + 1} threads" in done.found["device"]
    assert torch.get_num_threads() == before


def test_options_are_a_request_s_and_else_the_device_s_defaults() -> None:
    on_cpu, on_gpu = Options(rows=[1]), Options(rows=[2])
    options = requests.Request(model="qwen3-32b", device="cpu").options(on_cpu, on_gpu)
    assert (25600, 5120) in options.shapes and options.rows == [1] and options.device == CPU
    request = requests.Request(ops=["repack", "matmul", "repack"], rows=[4, 4, 8], device="cpu")
    assert request.options(on_cpu, on_gpu).rows == (4, 8)
    assert request.chosen_ops() == ("repack", "matmul")
    assert requests.parse_sizes(["16x32×64", "32x64"]) == (((32, 64),), {(32, 64): (16,)})


BAD = {
    "op": (["matmull"], "op: expected one of dequantize, "),
    "shape": (["--shapes", "4096"], "shapes: expected NxK or MxNxK such as 16x4096x4096, got 4096"),
    "shape_of_zero": (["--shapes", "0x64"], "shapes: expected NxK or MxNxK"),
    "model": (["--model", "gpt-2"], "model: expected one of llama-3-8b, llama-3-70b, qwen3-32b, "),
    "model_and_shapes": (["--model", "qwen3-32b", "--shapes", "1x1"], "model: expected a model or"),
    "dtype": (["--dtypes", "int8"], "dtypes: expected one of bf16, fp16, fp32, got int8"),
    "rows": (["--rows", "0"], "rows: expected at least 1, got 0"),
    "rows_twice": (["--rows", "2", "--shapes", "1x64x64"], "rows: expected none beside shapes"),
    "rounds": (["--rounds", "0"], "rounds: expected at least 1, got 0"),
    "threads": (["--threads", "-1"], "threads: expected at least 1, got -1"),
    "device": (["--device", "tpu"], "device: expected cuda, cuda:1, … or cpu, got tpu"),
    "gpu": (["--device", "cuda:99"], "device: expected one of the "),
    "target": (["--target", "sm_90"], "target: expected --compile beside it"),
    "op_and_tune": (["matmul", "--tune"], "ops: expected nothing of the kind beside --tune"),
    "shapes_and_render": (["--render", "--shapes", "1x1"], "shapes: expected nothing of the kind"),
    "no_file": (["--compare", "none.json", "none.json"], "none.json: expected a JSON file, got"),
}


@pytest.mark.parametrize("case", BAD)
def test_bench_mistake_is_one_line_and_status_2(case, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"nf4 bench: {message}")
    assert printed.err.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"device": "here"}', "expected results of nf4 bench, format nf4-bench-1, got None"),
        ("[1]", "expected results of nf4 bench"),
        ("{", "expected a JSON file"),
        ('{"format": "nf4-bench-1", "device": "x", "sections": {"a": {}}}', "got KeyError"),
        ('{"format": "nf4-bench-1", "device": "x", "sections": {}}', "holds results of x"),
    ],
    ids=["other_json", "list", "cut", "broken", "other_device"],
)
def test_bench_leaves_a_file_that_is_not_its_own(text, message, tmp_path, capsys) -> None:
    file = tmp_path / "taken.json"
    file.write_text(text)
    assert main(["bench", "repack", *TINY, "--out", str(file)]) == 2
    assert message in capsys.readouterr().err and file.read_text() == text


def test_a_peer_that_raises_or_is_wrong_is_left_out_with_the_reason() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    built = peers._made(lambda: {}["nothing"])

    def raises() -> None:
        raise RuntimeError("no\nkernel")

    functions = {
        "nf4": lambda: exact.float(),
        "raises": raises,
        "not built": lambda: built(exact),
        "wrong": lambda: exact.float() * 1.3,
        "nan": lambda: exact.float() * torch.nan,
        "shape": lambda: exact.float()[:, :2],
        "near": lambda: torch.cat([exact.float() * 1.1, 7 * exact.float()]),  # more rows
        "copy": lambda: torch.zeros(5, dtype=torch.uint8),
    }
    good, absent = run.usable(Case({}, functions, 1.0, expected=exact), CPU)
    assert list(good) == ["nf4", "near", "copy"]
    assert absent == {
        "raises": "RuntimeError: no kernel",
        "not built": "KeyError: 'nothing'",
        "wrong": "expected a relative error of at most 0.2, got 0.3",
        "nan": "expected a relative error of at most 0.2, got nan",
        "shape": "expected a result (2, 3), got (2, 2)",
    }


@pytest.mark.parametrize("factor", [1.3, None], ids=["wrong", "raises"])
def test_ours_is_not_left_out(factor) -> None:
    def ours() -> torch.Tensor:
        if factor is None:
            raise RuntimeError("no kernel")
        return torch.full((2, 3), factor)

    case = Case({}, {"nf4, more": ours}, 1.0, expected=torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises((ValueError, RuntimeError), match="not timed|no kernel"):
        run.usable(case, CPU)


def test_functions_take_turns_after_small_ones_have_run() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    found = measure.interleaved(functions, CPU, 3, small={"b": lambda: calls.append("small b")})
    assert calls[:-2] == ["a", "small b", "b"] * (measure.WARM_UP + 3)
    assert calls[-2:] == ["a", "b"], "memory is taken afterwards"
    assert [t.rounds for t in found.values()] == [3, 3]


@pytest.mark.parametrize(("seconds", "rounds"), [(1e9, 20), (0.0, 7)], ids=["fast", "slow"])
def test_rounds_follow_from_the_time_they_take(seconds, rounds, monkeypatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", seconds)
    assert measure.interleaved({"a": lambda: None}, CPU)["a"].rounds == rounds


def test_percentiles_are_those_of_the_counted_rounds(monkeypatch) -> None:
    times = iter([9e9] * measure.WARM_UP + [5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(measure, "_cpu_clock", lambda function: (next(times), 7.0))
    found = measure.interleaved({"a": lambda: None}, CPU, 6)["a"]
    assert (found.least, found.p20, found.median, found.p80) == (1.0, 2.0, 3.5, 5.0)
    assert found.cpu == 7.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no mark")
def test_peak_memory_on_a_cpu_counts_what_was_held_at_once() -> None:
    size = 40 << 20  # beyond 32 MB, below which glibc may keep what was freed before

    def function() -> None:
        first = torch.ones(size, dtype=torch.uint8)
        del first
        (torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8))

    # The system counts pages in batches, and the first call makes threads and their memory
    assert abs(footprint.cpu_peak(function) - 2 * size) < size / 8
    assert footprint.cpu_peak(lambda: None) <= 1 << 20


def test_peak_memory_is_unknown_where_the_system_keeps_no_mark(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(footprint, "PROCESS", tmp_path / "none")
    assert footprint.cpu_peak(lambda: None) is None


def test_a_gpu_is_asked_for_time_memory_launches_and_host(monkeypatch) -> None:
    """The calls to torch.cuda, on a GPU that is not here: 3 ms a call, 1000 bytes, two kernels."""
    kinds = torch.autograd.DeviceType
    events = [(kinds.CUDA, False), (kinds.CPU, False), (kinds.CUDA, True), (kinds.CUDA, False)]
    seen = [SimpleNamespace(device_type=k, is_user_annotation=named) for k, named in events]

    class Fake:
        def __init__(self, **kwargs) -> None:
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args) -> None:
            pass

        def record(self) -> None:
            pass

        synchronize = record

        def elapsed_time(self, end) -> float:
            return 3.0

        def events(self) -> list[SimpleNamespace]:
            return seen

    for name, value in {
        "Event": Fake,
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: 500,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 1500,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.profiler, "profile", Fake)
    monkeypatch.setattr(measure, "_memory", lambda size, device: torch.ones(1))
    found = measure.interleaved({"a": lambda: None}, torch.device("cuda"), 2)["a"]
    assert replace(found, host=None) == Timing(3e3, 3e3, 3e3, 3e3, 2, None, 1000, 2)
    assert found.host > 0
    seen.clear()
    assert footprint.launches(lambda: None, torch.device("cuda")) is None


def test_torch_compile_compiles_anew_for_each_kind_of_input(monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled.append(dynamic) or f)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    function = peers.Compiled(lambda x: 2 * x)
    for x in (torch.ones(2), torch.ones(2), torch.ones(3), torch.ones(3, requires_grad=True)):
        assert torch.equal(function(x), 2 * x)
    assert compiled == [False] * 3


def test_plot_draws_rooflines_and_sweeps(bench, tmp_path) -> None:
    folder = tmp_path / "new" / "plots"
    shapes = ["1x64x128", "4x64x128"]
    options = ["--device", "cpu", "--rounds", "1", "--dtypes", "bf16", "--plot", str(folder)]
    done = bench("matmul", "repack", "--shapes", *shapes, *options)
    names = ["matmul-64x128-bf16.png", "roofline-bf16.png"]
    assert sorted(f.name for f in folder.iterdir()) == names
    assert all((folder / n).read_bytes().startswith(b"\x89PNG") for n in names)
    assert sorted(done.errors[:-1]) == [str(folder / n) for n in names]


@pytest.mark.parametrize("script", sorted(BENCH.glob("bench_*.py")), ids=lambda p: p.stem)
def test_script_is_the_command_with_its_op(script, monkeypatch) -> None:
    given = []
    monkeypatch.setattr(nf4.commands.cli, "main", lambda arguments: given.append(arguments) or 3)
    monkeypatch.setattr(sys, "argv", [str(script), "--rounds", "1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 3
    assert given == [["bench", script.stem.removeprefix("bench_"), "--rounds", "1"]]


def test_script_runs_from_anywhere(tmp_path) -> None:
    command = [sys.executable, str(BENCH / "bench_repack.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: nf4 bench") and done.stderr == ""


def test_pytest_benchmark_runs_the_same(tmp_path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-q"]
    command += ["-k", "repack and tiny", "-p", "no:cacheprovider"]
    command += [f"--benchmark-json={tmp_path / 'found.json'}"]
    around = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    done = subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert len(found) == 4 and all(b["stats"]["rounds"] == 10 for b in found)
    groups = [f"repack: W 64×128, dtype bf16, direction to {way}" for way in ("fragments", "rows")]
    assert sorted({b["group"] for b in found}) == groups
    assert {b["name"].rpartition("-")[2] for b in found} == {"nf4]", "copy]"}


def test_modelled_figures_are_the_committed_ones(capsys) -> None:
    runpy.run_path(str(BENCH / "harness" / "modelled.py"), run_name="__main__")
    page = capsys.readouterr().out
    assert page.startswith("# Modelled for an H200, not measured\n")
    committed = (BENCH / "results" / "modelled-h200.md").read_text(encoding="utf-8")
    if f"Triton {triton.__version__}" not in committed:
        pytest.skip("the committed page counts what another Triton compiled")
    assert page == committed
