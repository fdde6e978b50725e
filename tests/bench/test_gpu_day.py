"""The GPU day: small commands in the stages' place, the plan, and a trial without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench" / "gpu_day"
sys.path.insert(0, str(BENCH))
try:
    import gpu_day
    import gpu_parts
    import gpu_stages
finally:
    sys.path.remove(str(BENCH))


def stage(name: str, code: str, **options) -> gpu_stages.Stage:
    """Return a stage that runs Python."""
    return gpu_stages.Stage(name, [sys.executable, "-c", code], **{"seconds": 1.0, **options})


def run(stages, folder: Path, seconds: float = 60.0) -> tuple[int, dict[str, dict]]:
    """Run stages and return the status and the summary's rows by stage."""
    status = gpu_day.Day(stages, folder, "GPU day: a test", seconds).run(time.monotonic())
    rows = json.loads((folder / "summary.json").read_text())["stages"]
    assert [row["stage"] for row in rows] == [stage.name for stage in stages]
    return status, {row["stage"]: row for row in rows}


processes = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks at processes in /proc"
)


def alive(pid: int) -> bool:
    """Whether a process runs: a killed one may wait for its parent, as a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# Ignores interrupts, and so does the process that it starts and whose number it writes
STUBBORN = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("so far")
time.sleep(float(sys.argv[2]))
"""


def stubborn(name: str, pid: Path, seconds: float, **options) -> gpu_stages.Stage:
    """Return a stage that sleeps, and starts a process that outlives it."""
    command = [sys.executable, "-c", STUBBORN, str(pid), str(seconds)]
    return gpu_stages.Stage(name, command, 1.0, **options)


@processes
def test_day_goes_on_after_what_fails_and_what_takes_too_long(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["gpu_run"], "GRACE", 0.5)
    late, early = tmp_path / "late", tmp_path / "early"
    stages = [
        stubborn("slow", late, 60, output="slow.json"),
        stage("wrong", "print('1 2'); raise SystemExit('it | broke')"),
        gpu_stages.Stage("nowhere", [str(tmp_path / "no-such")], 1.0),
        stage("missing", "", left_out="there is no such tool"),
        stubborn("leaving", early, 0),
        stage("last", "print([1, 2])", output="last.json", found=lambda text: f"found {text}"),
    ]
    folder = tmp_path / "day"
    folder.mkdir()
    status, rows = run(stages, folder, seconds=20.0)
    assert status == 1
    results = {name: (row["result"], row["status"]) for name, row in rows.items()}
    assert results == {
        "slow": ("timed out", -signal.SIGKILL),
        "wrong": ("failed", 1),
        "nowhere": ("failed", None),
        "missing": ("left out", None),
        "leaving": ("ok", 0),
        "last": ("ok", 0),
    }
    assert 3.5 < rows["slow"]["seconds"] < 8
    assert rows["wrong"]["found"] == "it | broke" and rows["last"]["found"] == "found [1, 2]"
    assert "no-such" in rows["nowhere"]["found"]
    assert rows["missing"]["found"] == "there is no such tool"
    assert not alive(int(late.read_text())) and not alive(int(early.read_text()))
    lines = (folder / "summary.md").read_text().splitlines()
    assert "| wrong | failed, status 1 |" in lines[7] and lines[7].endswith("it \\| broke |")
    assert sorted(p.name for p in folder.iterdir()) == [
        "last.json",
        "logs",
        "summary.json",
        "summary.md",
    ]
    # What was cut off is kept, but not as a result
    assert (folder / "logs" / "slow.out").read_text() == "so far\n"
    assert (folder / "logs" / "wrong.txt").read_text() == "1 2\nit | broke\n"


def test_day_succeeds_if_all_that_ran_did(tmp_path) -> None:
    good, missing = stage("good", ""), stage("missing", "", left_out="no tool")
    for number, (stages, expected) in enumerate([([good, missing], 0), ([missing], 1)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert run(stages, folder)[0] == expected


def test_day_says_what_its_time_was_not_enough_for(tmp_path) -> None:
    stages = [stage("first", "", seconds=50.0), stage("second", "", seconds=0.5)]
    status, rows = run(stages, tmp_path, seconds=20.0)
    assert status == 0 and rows["second"]["result"] == "ok"  # in the time that the first left
    (tmp_path / "again").mkdir()
    status, rows = run(stages, tmp_path / "again", seconds=0.5)
    assert status == 1
    assert {row["result"] for row in rows.values()} == {"not run"}
    assert rows["first"]["found"] == "its time was spent"


def test_stages_of_a_wave_run_beside_each_other(tmp_path) -> None:
    meet = """
import pathlib, sys, time
mine, other = map(pathlib.Path, {!r})
mine.touch()
end = time.monotonic() + 20
while not other.exists():
    assert time.monotonic() < end
    time.sleep(0.01)
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    stages = [
        stage("one", meet.format((a, b)), wave="both"),
        stage("two", meet.format((b, a)), wave="both"),
    ]
    assert run(stages, tmp_path)[0] == 0


@processes
def test_day_that_is_cut_off_leaves_its_summary_and_no_process(tmp_path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(BENCH)!r})
import gpu_day, gpu_stages, pathlib, signal
signal.signal(signal.SIGTERM, gpu_day._interrupted)
sleep = "import os, sys, time; print(os.getpid()); time.sleep(60)"
command = [sys.executable, "-c", sleep]
stages = [gpu_stages.Stage("good", [sys.executable, "-c", ""], 1.0),
          gpu_stages.Stage("long", command, 1.0), gpu_stages.Stage("never", command, 1.0)]
gpu_day.Day(stages, pathlib.Path({str(tmp_path)!r}), "GPU day", 100.0).run(time.monotonic())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        log, end = tmp_path / "logs" / "long.txt", time.monotonic() + 20
        while not (log.exists() and log.read_text().endswith("\n")):
            assert time.monotonic() < end
            time.sleep(0.02)
        during = json.loads((tmp_path / "summary.json").read_text())["stages"]
        assert [row["result"] for row in during] == ["ok", "running", "not run"]
        process.terminate()
        assert process.wait(20) != 0
    finally:
        process.kill()
        process.wait()
    after = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [row["result"] for row in after] == ["ok", "interrupted", "not run"]
    pid = int(log.read_text())
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert not alive(pid)


def test_folder_must_be_new(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    assert gpu_day.main(["--device", "cpu", "--out", "taken"]) == 2
    error = "gpu_day: out: expected a folder that does not exist yet, taken does\n"
    assert capsys.readouterr().err == error
    made = [gpu_day.make_folder(None) for _ in range(3)]
    names = ["nf4-gpu-day", "nf4-gpu-day-2", "nf4-gpu-day-3"]
    assert made == [tmp_path.resolve() / name for name in names]
    assert gpu_day.make_folder("a/b") == tmp_path.resolve() / "a" / "b"


def test_day_needs_a_gpu(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_day.main([]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("gpu_day: expected a GPU, PyTorch finds none") and error.count("\n") == 1
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('broken\\nin two lines')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    assert gpu_day.main([]) == 2
    error = capsys.readouterr().err
    assert "expected a Python that imports torch" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [broken]


def test_day_refuses_what_it_cannot_do(capsys) -> None:
    assert gpu_day.main(["--device", "cpu", "--seconds", "nan"]) == 2
    assert "seconds: expected at least 10, got nan" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        gpu_day.main(["--stages", "dancing"])
    assert "dancing" in capsys.readouterr().err


def test_list_names_every_stage(capsys) -> None:
    assert gpu_day.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(gpu_stages.GROUPS)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_plan_has_every_group_within_its_seconds(device, tmp_path) -> None:
    stages = gpu_stages.plan(tmp_path, device)
    waves: dict[str, float] = {}
    for one in stages:
        assert set(one.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
        key = one.wave or one.name
        waves[key] = max(waves.get(key, 0.0), one.seconds)
    assert list(dict.fromkeys(one.group for one in stages)) == list(gpu_stages.GROUPS)
    assert sum(waves.values()) == pytest.approx(gpu_stages.SECONDS)
    names = [one.name for one in stages]
    assert len(names) == len(set(names))
    for script in BENCH.parent.glob("bench_*.py"):
        assert f"benchmarks-{script.stem.removeprefix('bench_')}" in names
    kernels = next(one for one in stages if one.name == "tests-kernels")
    assert "tests/kernels/test_repack.py" in kernels.command
    assert ("tests/kernels/test_matmul.py" in kernels.command) == (device == "cuda")


def test_plan_leaves_out_tests_of_packages_that_are_missing(tmp_path, monkeypatch) -> None:
    found = gpu_stages.find_spec
    missing = {"hypothesis", "bitsandbytes"}
    monkeypatch.setattr(gpu_stages, "find_spec", lambda n: None if n in missing else found(n))
    kernels = next(s for s in gpu_stages.plan(tmp_path, "cuda") if s.name == "tests-kernels")
    assert "tests/kernels/test_quantize.py" not in kernels.command and not kernels.left_out
    assert (
        "not bitsandbytes" in kernels.command and "tests/kernels/test_matmul.py" in kernels.command
    )
    assert "tests/kernels/test_quantize.py left out: no hypothesis" in kernels.found(
        "3 passed in 1s"
    )
    missing.add("pytest")
    reasons = {s.name: s.left_out for s in gpu_stages.plan(tmp_path, "cuda")}
    assert reasons["tests-kernels"] == reasons["tests-layers"] == "pytest is not installed"
    assert not reasons["verify"]


def test_sanitizer_is_found_on_the_path_and_in_cuda_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_stages.glob, "glob", lambda pattern: [])
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert gpu_stages.find_sanitizer() == ""
    reasons = {s.name: s.left_out for s in gpu_stages.plan(tmp_path, "cuda")}
    assert reasons["memcheck"] == "compute-sanitizer is not installed"
    for name, folder in (("CUDA_HOME", "CUDA_HOME/bin"), ("PATH", "PATH")):
        tool = tmp_path / folder / "compute-sanitizer"
        tool.parent.mkdir(parents=True)
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
        assert gpu_stages.find_sanitizer() == str(tool), name
    reasons = {s.name: s.left_out for s in gpu_stages.plan(tmp_path, "cuda")}
    assert not reasons["racecheck"]


def test_what_is_found_is_one_line() -> None:
    failed = "FAILED tests/test_a.py::test_b[(4, 96)-x] - ValueError: no\n"
    totals = "4 failed, 2775 passed, 1 error"
    text = f"..F.\n{4 * failed}ERROR tests/test_c.py\n{totals} in 61.0s (0:01:01)\n"
    found = gpu_stages.tests_found(text)
    name = "tests/test_a.py::test_b[(4, 96)-x]"
    assert found == f"{totals}: {name}, {name}, {name} and 2 more"
    assert gpu_stages.tests_found("...") == "no totals"
    rows = [{"operator": op, "ok": ok} for op, ok in [("a", True), ("b", False), ("b", False)]]
    assert gpu_stages.comparisons(json.dumps(rows)) == "1 of 3 comparisons are right; wrong: b"
    assert gpu_stages.comparisons(json.dumps(rows[:1])) == "1 of 1 comparisons are right"
    text = "========= COMPUTE-SANITIZER\n83\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_stages.checker_found(text) == "0 errors"


def test_launch_reaches_every_operator(monkeypatch) -> None:
    from nf4.ops import registry

    called = set()
    found = registry.implementation
    monkeypatch.setattr(
        registry, "implementation", lambda op, kind: called.add(op) or found(op, kind)
    )
    assert gpu_parts.launch() > 50
    assert called >= {"quantize", "quantize_mse", "quantize_absmax", "dequantize", "repack"}
    assert called >= {"linear", "lora_linear"}


def test_day_without_a_gpu(tmp_path) -> None:
    command = [sys.executable, str(BENCH / "gpu_day.py"), "--device", "cpu", "--out", "found"]
    command += ["--stages", "environment", "tune", "memcheck"]
    away = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=away, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{tmp_path.resolve() / 'found' / 'summary.md'}\n")
    machine = json.loads((tmp_path / "found" / "environment.json").read_text())
    assert machine["device"] is None and machine["versions"]["torch"]
    summary = (tmp_path / "found" / "summary.md").read_text()
    assert (
        "| environment | ok |" in summary
        and "| memcheck | left out | 0.0 | needs a GPU |" in summary
    )
