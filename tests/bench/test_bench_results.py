"""Files of measurements: their circumstances, what changed between two, the page and pictures."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nf4.bench.harness import circumstances, compare, plots, render, results, summary
from nf4.bench.harness.ceilings import Ceilings
from nf4.bench.harness.measure import Timing
from nf4.commands.cli import main

BENCH = Path(__file__).resolve().parents[2] / "bench"
LIMITS = Ceilings(copy=1e10, products={"bf16": 1e11, "fp32": 1e11}, spread=1.05)
AROUND = {
    "device": "Some CPU, 2 threads",
    "driver": None,
    "threads": 2,
    "load": 0.5,
    "versions": {"python": "3.11", "torch": "2.13"},
    "commit": "abc1234",
    "dirty": True,
    "date": "2026-01-02T03:04:05+00:00",
}


def timing(median: float, spread: float = 0.01, **more) -> Timing:
    return Timing(median, median * (1 - spread), median * (1 + spread), 0.9 * median, 20, **more)


def section(timings: dict[str, Timing], m: int = 1, **absent: str) -> results.Section:
    labels = {"W": "64×128", "dtype": "bf16", "M": str(m), "ours": "linear"}
    row = results.Row(labels, "bf16", 1e6, 1e9, 100.0, None, timings, absent)
    return results.Section("linear", AROUND, LIMITS, {}, [row])


def write(path: Path, *sections: tuple[str, results.Section], device: str = "here") -> Path:
    path.write_text(results.Results(device, dict(sections)).to_json(), encoding="utf-8")
    return path


def test_commit_and_changes_are_those_of_this_checkout(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "checkout" / "bench"
    (folder / "results").mkdir(parents=True)
    monkeypatch.setattr(circumstances, "FOLDER", folder)

    def git(*arguments: str) -> None:
        options = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
        command = ["git", *options, "-C", str(folder.parent), *arguments]
        subprocess.run(command, check=True, capture_output=True)

    (folder / "code.py").write_text("1")
    (folder / "results" / "here.json").write_text("1")
    assert circumstances._commit() == (None, False), "no checkout"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = circumstances._commit()
    assert len(commit) >= 7 and not dirty
    (folder / "results" / "here.json").write_text("2")
    assert circumstances._commit() == (commit, False), "what a run writes is no change"
    (folder / "code.py").write_text("2")
    assert circumstances._commit() == (commit, True)
    monkeypatch.setattr(circumstances, "FOLDER", folder / "results")
    assert circumstances._commit() == (None, False), "a folder in another project's checkout"


def test_driver_is_read_from_the_system(tmp_path, monkeypatch) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release\n"
    )
    monkeypatch.setattr(circumstances, "DRIVERS", (tmp_path / "none", file))
    assert circumstances._driver() == "570.124.06"
    monkeypatch.setattr(circumstances, "DRIVERS", ())
    assert circumstances._driver() is None


# Medians in microseconds of ours and of a peer, old and new, and what is said of ours
COMPARED = {
    "same": (100, 50, 101, 50, None),
    "slower": (100, 50, 110, 50, "slower"),
    "faster": (100, 50, 90, 50, "faster"),
    "within_the_spread": (100, 50, 104, 50, None),  # new p20 102.96, old p80 101
    "just_beyond_it": (100, 50, 105.2, 50, "slower"),  # new p20 104.15, old p80 101
    "as_the_machine": (100, 50, 120, 60, None),
    "more_than_the_machine": (100, 50, 130, 60, "slower"),
    "a_faster_peer_excuses_nothing": (100, 50, 110, 40, "slower"),
    "finer_than_the_clock": (5, 50, 5.5, 50, None),
}


@pytest.mark.parametrize("case", COMPARED)
def test_compare_tells_a_change_from_the_spread(case, tmp_path, capsys) -> None:
    old, old_peer, new, new_peer, kind = COMPARED[case]
    files = [
        write(tmp_path / name, ("matmul", section({"nf4": timing(own), "copy": timing(peer)})))
        for name, own, peer in (("old.json", old, old_peer), ("new.json", new, new_peer))
    ]
    assert [change.kind for change in compare.compare(*files)] == [kind] * (kind is not None)
    status = main(["bench", "--compare", *map(str, files)])
    printed = capsys.readouterr().out
    assert status == (kind == "slower")
    assert f"| nf4 | {kind} |" in printed if kind else "Nothing changed" in printed


def test_compare_counts_ours_alone_and_lists_what_one_file_has(tmp_path, capsys) -> None:
    old = {"nf4": timing(100), "nf4, out=": timing(9), "copy": timing(5), "dense": timing(5)}
    new = {"nf4": timing(100), "nf4, alone": timing(9), "copy": timing(9), "dense": timing(5)}
    one = write(tmp_path / "a", ("matmul", section(old)), ("repack", section(old)))
    two = write(tmp_path / "b", ("matmul", section(new)), ("quantize", section(old)))
    changes = compare.compare(one, two)
    assert [(c.op, c.name, c.kind) for c in changes] == [
        ("matmul", "nf4, alone", "only in the new"),
        ("matmul", "nf4, out=", "only in the old"),
        ("quantize", "", "only in the new"),
        ("repack", "", "only in the old"),
    ]
    assert main(["bench", "--compare", str(one), str(two), "--json"]) == 0
    assert [c["kind"] for c in json.loads(capsys.readouterr().out)] == [c.kind for c in changes]
    three = write(tmp_path / "c", ("matmul", section(old, m=2)))
    assert [c.kind for c in compare.compare(one, three)][:4] == [
        "only in the new",
        "only in the new",
        "only in the old",
        "only in the old",
    ], "another M is another case"


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ({"launches": 2}, {"launches": 3}, "launches"),
        ({"peak": 10**7}, {"peak": 2 * 10**7}, "memory"),
        ({"peak": 10**7}, {"peak": 10**7 + 10**5}, None),
        ({"peak": None}, {"peak": 10**7}, None),
    ],
    ids=["launches", "memory", "about_the_same_memory", "memory_not_known"],
)
def test_compare_shows_launches_and_memory_without_failing(old, new, kind, tmp_path) -> None:
    files = [
        write(tmp_path / name, ("matmul", section({"nf4": timing(100, **more)})))
        for name, more in (("old", old), ("new", new))
    ]
    changes = compare.compare(*files)
    assert [change.kind for change in changes] == [kind] * (kind is not None)
    assert not compare.regressed(changes) and compare.table(changes)


def test_compare_refuses_two_devices(tmp_path, capsys) -> None:
    files = [str(write(tmp_path / name, device=name)) for name in ("one", "two")]
    assert main(["bench", "--compare", *files]) == 2
    message = "nf4 bench: compare: expected files of one device, got one and two\n"
    assert capsys.readouterr().err == message


def test_page_is_made_of_the_files_of_known_formats(tmp_path, monkeypatch) -> None:
    timings = {"nf4": timing(100, cpu=150.0, peak=2 * 10**6), "dense": timing(250)}
    write(tmp_path / "b.json", ("matmul", section(timings, torchao="TypeError: no")), device="B")
    (tmp_path / "a.json").write_text('{"format": "nf4-smollm2-1", "n": 3}')
    (tmp_path / "demo.json").write_text('{"device": "none"}')
    (tmp_path / "later.json").write_text('{"format": "nf4-something-9"}')
    fake = SimpleNamespace(tables=lambda data: f"## A\n\n{data['n']} tokens\n")
    monkeypatch.setitem(sys.modules, "nf4.bench.model.smollm2", fake)
    first, second, *_ = (page := render.page(tmp_path)).splitlines()
    assert "Generated by `nf4 bench --render`" in first and "`nf4 bench`" in second
    assert page.index("## A\n\n3 tokens\n") < page.index("## B\n")
    assert "2026-01-02 03:04 UTC; commit abc1234, with changes; python 3.11" in page
    assert "copy 10 GB/s; products, TFLOP/s: bf16 0.1, fp32 0.1; 80th / 20th perc" in page
    row = (
        "| 64×128 | bf16 | 1 | linear | nf4 | 100.0 | 99.0–101.0 | 10 | 10 | 100% | 150.0 | 2.00 |"
    )
    assert f"{row} 1.00 |\n" in page
    assert "| dense | 250.0 | 247.5–252.5 | 4 | 4 | 40% |  |  | 2.50 |\n" in page
    assert "Not timed: torchao, 1 of 1 cases: TypeError: no\n" in page
    monkeypatch.setitem(render.MODULES, "nf4-smollm2-1", "nf4.bench.not_there")
    assert "## A" not in render.page(tmp_path) and "## B" in render.page(tmp_path)


def test_committed_page_is_that_of_the_committed_results() -> None:
    assert (BENCH / "README.md").read_text(encoding="utf-8") == render.page()


def test_render_writes_the_page_of_a_checkout(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(render, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(summary, "README", tmp_path / "front.md")
    monkeypatch.setattr(summary, "GUIDE", tmp_path / "guide.md")
    summary.README.write_text(f"above\n{summary.FRONT}\nold\n{summary.END}\nbelow\n")
    old = f"above\n{summary.BEGIN}\nold\n{summary.END}\nbelow\n{summary.METHODS}{summary.END}\n"
    summary.GUIDE.write_text(old)
    assert main(["bench", "--render"]) == 0
    made = f"above\n{summary.BEGIN}\n\n{summary.summary()}\n{summary.END}\nbelow\n"
    made += f"{summary.METHODS}\n\n{summary.methods()}\n{summary.END}\n"
    assert summary.GUIDE.read_text() == made
    front = f"above\n{summary.FRONT}\n\n{summary.front()}\n{summary.END}\nbelow\n"
    assert summary.README.read_text() == front
    assert capsys.readouterr().out == f"{tmp_path / 'README.md'}\n"
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == render.page()
    monkeypatch.setattr(results, "RESULTS", tmp_path / "none")
    assert main(["bench", "--render"]) == 2
    assert "expected a checkout with bench/results" in capsys.readouterr().err


def test_sweep_shows_every_function_s_time_and_its_ratio_to_ours() -> None:
    rows = [
        section({"nf4": timing(10.0 * m), "dense": timing(20.0)}, m).rows[0] for m in (1, 4, 16)
    ]
    (left, right) = plots._sweep("title", rows).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert lines == {
        "nf4": [10, 40, 160],
        "dense": [20, 20, 20],
        "measured ceilings": [100, 100, 100],
    }
    assert [list(line.get_ydata()) for line in right.lines] == [[1, 1, 1], [2, 0.5, 0.125]]
    assert left.get_ylabel() == "time of a call, µs" and left.get_xlabel() == "rows of x, M"


def test_roofline_is_the_lower_of_both_ceilings() -> None:
    found = results.Results("here", {"matmul": section({"nf4": timing(100)})})
    (ax,) = plots._roofline(found, "bf16", [("matmul", found.sections["matmul"].rows[0])]).axes
    points, roof = ax.lines
    assert list(points.get_xdata()) == [1000] and list(points.get_ydata()) == [10000]
    assert "GFLOP/s" in ax.get_ylabel() and ax.get_legend() is not None
    x, y = roof.get_data()
    assert y[0] == pytest.approx(min(10 * x[0], 100)) and y[-1] == pytest.approx(100)


def test_results_go_to_a_file_of_the_device_s_name(tmp_path, monkeypatch) -> None:
    assert results.default_path("NVIDIA H200") == BENCH / "results" / "nvidia-h200.json"
    monkeypatch.setattr(results, "RESULTS", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    assert results.default_path("A (R), 2 threads") == tmp_path / "a-r-2-threads.json"


def test_pages_have_the_figures_of_the_committed_results() -> None:
    text = summary.README.read_text(encoding="utf-8")
    assert f"{summary.FRONT}\n\n{summary.front()}\n{summary.END}" in text
    for device in ("| AMD EPYC, 2 threads |", "| NVIDIA H200 |", "[demo-cpu]"):
        assert device in text
    text = summary.GUIDE.read_text(encoding="utf-8")
    assert f"{summary.BEGIN}\n\n{summary.summary()}\n{summary.END}" in text
    assert f"{summary.METHODS}\n\n{summary.methods()}\n{summary.END}" in text
    assert "quantize | bf16" in text and "generate 64 tokens" in text


def test_readme_without_marks_is_left_as_it_is(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(summary, "README", tmp_path / "README.md")
    summary.README.write_text("by hand")
    monkeypatch.setattr(summary, "GUIDE", tmp_path / "guide.md")
    with pytest.raises(ValueError, match="render: expected .*README.md to hold <!-- Made by"):
        summary.write_readme()
    assert summary.README.read_text() == "by hand"
    summary.README.write_text(f"{summary.FRONT}{summary.END}")
    with pytest.raises(ValueError, match="render: expected .*guide.md to hold <!-- Made by"):
        summary.write_readme()
    assert summary.README.read_text() == f"{summary.FRONT}{summary.END}"
