"""What a small call costs the host, and what comes once."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="nf4's kernels need Triton")

import nf4
from nf4.bench.harness import host_cost

# Functions that a call enters, of Python and built in, once warm: what the host's time is made of,
# and the same on every machine. A few more than are counted today, for other versions of Python.
# The checks of `nf4.quantize` and the loops over a launch's arguments are in it.
BUDGETS = {
    "nf4.quantize": 130,
    "nf4.dequantize": 76,
    "nf4.dequantize, out=": 86,
    "nf4.linear, M = 1": 44,
    "nf4.linear, M = 16": 44,
    "nf4.lora_linear, M = 1": 60,
    "nf4.lora_linear, M = 16": 60,
    "LinearNF4, M = 1": 50,
    "QLoRALinear, M = 1": 80,
}


def test_small_calls_enter_few_functions() -> None:
    # In a process of its own: coverage traces this one, and its new memory is filled
    code = (
        "import json; from nf4.bench.harness.host_cost import counts; print(json.dumps(counts()))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[host_cost.LINEAR] == found["torch.empty"] == 1
    assert {name: found[name] for name, most in BUDGETS.items() if found[name] > most} == {}


def test_host_cost_measures_each_call_and_puts_the_operators_back() -> None:
    cost = host_cost.rows(calls=20)
    assert len(cost) == 12 and all(value > 0 for value in cost.values())
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
