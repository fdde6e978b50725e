"""What a small call costs the host, beside PyTorch's own; and what comes once."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="nf4's kernels need Triton")

import nf4
from nf4.bench import host_cost


@pytest.mark.alone
def test_a_small_product_costs_the_host_little_more_than_pytorch_s() -> None:
    # In a process of its own: coverage traces this one, and its new memory is filled
    code = "import json; from nf4.bench import host_cost; print(json.dumps(host_cost.rows()))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    shares = []
    for _ in range(3):  # what else runs on the machine can only add
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        cost = json.loads(done.stdout)
        shares.append(cost["nf4.linear, M = 1"] / cost[host_cost.LINEAR] - 1)
    # Some 10 us beyond F.linear, where that takes 3; a quarter more for what machines differ by
    assert min(shares) <= 1.25 * 10 / 3, shares


def test_host_cost_measures_each_call_and_puts_the_operators_back() -> None:
    cost = host_cost.rows(calls=20)
    assert len(cost) == 8 and all(value > 0 for value in cost.values())
    assert cost["nf4.linear, M = 1"] > cost["torch.empty"]
    q = nf4.quantize(torch.ones(64))
    assert torch.equal(nf4.dequantize(q), torch.ones(64))


def test_host_cost_prints_tables_and_writes_a_file(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(host_cost, "CALLS", 20)
    monkeypatch.setattr(sys, "argv", ["host_cost.py", "--out", str(tmp_path / "found.json")])
    host_cost.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["format"] == host_cost.FORMAT and found["versions"]["torch"]
    assert found["once"]["import nf4"] > 0 and found["once"]["first nf4.linear, M = 1"] > 0
    assert capsys.readouterr().out == host_cost.tables(found)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
