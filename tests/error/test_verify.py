"""`nf4 verify`: it passes here, and notices what is wrong."""

import json

import pytest
import torch

from nf4.commands.cli import main
from nf4.error import verify as module
from nf4.ops import registry

BITS = {"quantize", "quantize, scales", "quantize_absmax", "dequantize", "embedding"}


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(module, "_SHAPES", ((96, 130), (7, 33)))
    monkeypatch.setattr(module, "_ROWS", (1, 17))


def test_verify_passes_on_a_cpu(small, capsys) -> None:
    before = torch.random.get_rng_state()
    assert main(["verify", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["ok"] and row["found"] <= row["bound"] for row in rows)
    assert {row["operator"] for row in rows if row["against"] == "bits"} >= BITS
    exact = {row["operator"] for row in rows if row["against"] == "float64"}
    assert exact == {"linear", *(f"lora_linear, rank 8, dropout {p}" for p in (0.0, 0.25))}
    assert any(row["found"] > 0 for row in rows), "float64 is not what was compared"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_verify_tells_of_every_comparison(small) -> None:
    told = []
    rows = module.verify("cpu", lambda *counts: told.append(counts))
    assert told == [(done, len(rows)) for done in range(1, len(rows) + 1)]
    assert module.comparisons() == len(rows)


def test_verify_prints_a_table(small, capsys) -> None:
    assert main(["verify"]) == 0
    printed = capsys.readouterr().out
    assert "quantize_absmax" in printed and "wrong" in printed


def off_by_one_bit(function):
    """Let a function that returns a tensor be wrong in one bit of one element."""

    def wrong(*args):
        out = function(*args)
        if out.numel():
            bits = out.view(-1)[:1].view(torch.uint8)
            bits[0] ^= 1
        return out

    return wrong


def doubled_adapter(function):
    def wrong(*args):
        y, t = function(*args)
        return y * 1.01, t

    return wrong


@pytest.mark.parametrize(
    ("op", "spoil", "named"),
    [("dequantize", off_by_one_bit, "dequantize"), ("lora_linear", doubled_adapter, "lora_linear")],
)
def test_verify_notices_a_wrong_operator(op, spoil, named, small, monkeypatch, capsys) -> None:
    right = registry.implementation(op, "cpu")
    implementation = registry.implementation

    def chosen(name: str, kind: str):
        return spoil(right) if name == op else implementation(name, kind)

    monkeypatch.setattr(registry, "implementation", chosen)
    assert main(["verify", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{named}") and "at most" in line for line in lines)


def test_nan_is_wrong() -> None:
    assert not module.Check("linear", "", "float64", float("nan"), 1.0).ok


@pytest.mark.parametrize("device", ["cuda:7", "nowhere"])
def test_verify_refuses_a_device_that_is_not_here(device, capsys) -> None:
    if device == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("there is one")
    assert main(["verify", "--device", device]) == 2
    assert f"device: expected one that is here, got {device}" in capsys.readouterr().err
