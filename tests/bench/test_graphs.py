"""Kernels timed by CUDA graphs: a trial without a GPU, the file, the table, bad arguments."""

import json

import pytest

pytest.importorskip("triton", reason="nf4's kernels need Triton")

from nf4.bench.harness import graphs


def test_graphs_times_every_contender_and_writes_after_each_case(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(graphs, "ROWS", (1, 16))
    written = []
    monkeypatch.setattr(graphs, "write_file", lambda path, text: written.append(json.loads(text)))
    assert graphs.main(["--shapes", "64x128", "--out", str(tmp_path / "found.json")]) == 0
    assert [len({row[1] for row in found["rows"]}) for found in written] == [1, 2, 3]
    found = written[-1]
    assert found["format"] == graphs.FORMAT and found["left_out"] == 0
    assert {row[0] for row in found["rows"]} == {"linear", "dequantize"}
    assert all(row[3] > 0 for row in found["rows"])
    printed = capsys.readouterr().out
    assert printed == graphs.tables(found)
    assert "| linear | 64×128, M = 16 |" in printed and "dense bf16" in printed


def test_graphs_leaves_out_what_its_time_does_not_allow(capsys) -> None:
    assert graphs.main(["--shapes", "64x128", "--limit", "0"]) == 0
    found = graphs.measure([(64, 128)], 0, None)
    assert found["rows"] == [] and found["left_out"] == len(graphs.ROWS) + 1
    assert "| operator | size |" in capsys.readouterr().out


def test_graphs_refuses_what_is_no_shape(capsys) -> None:
    assert graphs.main(["--shapes", "64"]) == 2
    assert capsys.readouterr().err == "graphs: shapes: expected NxK such as 4096x4096, got 64\n"
