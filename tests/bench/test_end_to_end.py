"""The end-to-end benchmarks on tiny models: every contender and check, the table and the file."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

import nf4
from nf4.bench.model import contenders, end_to_end, llama, smollm2
from nf4.bench.model import end_to_end_run as runs

TINY = llama.Options("tiny", "cpu", rounds=1, length=64, new_tokens=2)
NAMES = ["dense", "bitsandbytes", "nf4"]
pytestmark = pytest.mark.usefixtures("bnb")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Threads of tiny products wait for each other longer than they work, beside other tests."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shell(monkeypatch):
    """Set the arguments of the shell."""
    return lambda *arguments: monkeypatch.setattr(sys, "argv", ["script", *arguments])


@pytest.fixture
def without_bitsandbytes(monkeypatch) -> None:
    monkeypatch.setitem(contenders._NEEDED, "bitsandbytes", ("no_such_package", "peft"))


@pytest.fixture
def wrong_codes(monkeypatch) -> None:
    """Quantize ours in other blocks than bitsandbytes."""
    quantize = contenders.quantize

    def wrong(name, model, dtype):
        if name == "nf4":
            return nf4.quantize_model(model, block_size=128)
        return quantize(name, model, dtype)

    monkeypatch.setattr(contenders, "quantize", wrong)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_end_to_end_times_every_contender_in_its_own_process(shell, tmp_path, capsys) -> None:
    out = tmp_path / "found.json"
    sizes = ["--size", "tiny", "--rounds", "1", "--length", "64", "--new-tokens", "2"]
    shell(*sizes, "--device", "cpu", "--out", str(out))
    end_to_end.main()
    printed = capsys.readouterr().out
    data = json.loads(out.read_text(encoding="utf-8"))
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]
    assert data["format"] == "nf4-end-to-end-1" and data["left_out"] == {}
    assert list(data["results"]) == NAMES and data["together"]
    assert data["versions"]["torch"] == torch.__version__ and data["device"] and data["date"]
    for row in data["results"].values():
        rates = [row["step"], *row["decode"].values()]
        assert all(0 < rate["p20"] <= rate["median"] <= rate["p80"] for rate in rates)
        assert list(row["decode"]) == ["1", "8", "32"]
        # A random model knows nothing; r = 16 on both sides of seven layers, twice
        assert row["first_loss"] == pytest.approx(math.log(320), abs=0.2)
        widths = [2 * 64, 2 * (64 + 32), 2 * 64, 3 * (64 + 192)]
        assert row["trained"] == 2 * 16 * sum(widths)
        assert not sys.platform.startswith("linux") or 0 < row["peak"] < 1e9
    differences = data["differences"]
    assert differences["dequantized weights"] <= differences["bitsandbytes"] < 0.01
    assert printed == end_to_end.tables(data)
    head, _, *rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert cells(head)[1:3] == ["training tokens/s", "p20–p80"] and len(cells(head)) == 9
    assert [cells(row)[0] for row in rows] == ["nf4", "bitsandbytes + PEFT", "dense bf16 + PEFT"]
    assert all(len(cells(row)) == 9 and cells(row)[1] for row in rows)


@pytest.fixture
def not_timed(monkeypatch) -> None:
    def fail(*_):
        pytest.fail("a wrong result was timed")

    monkeypatch.setattr(runs.Run, "step", fail)


@pytest.mark.usefixtures("wrong_codes", "not_timed")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_end_to_end_refuses_other_codes_than_bitsandbytes(dtype) -> None:
    with pytest.raises(ValueError, match="nats of those with bitsandbytes, got .*; not timed"):
        end_to_end.measure(replace(TINY, dtype=dtype), runs.Run)


@pytest.mark.usefixtures("without_bitsandbytes", "not_timed")
def test_end_to_end_refuses_wrong_products_without_bitsandbytes_too(monkeypatch) -> None:
    forward = nf4.QLoRALinear.forward
    monkeypatch.setattr(nf4.QLoRALinear, "forward", lambda self, x: 1.05 * forward(self, x))
    with pytest.raises(ValueError, match="those with dequantized weights, got .*; not timed"):
        end_to_end.measure(TINY, runs.Run)


@pytest.mark.usefixtures("without_bitsandbytes")
def test_end_to_end_records_what_is_missing_and_runs_what_does_not_fit_by_turns(
    monkeypatch,
) -> None:
    alive, most = set(), []

    class Counted(runs.Run):
        def __init__(self, name, options) -> None:
            super().__init__(name, options)
            alive.add(name)
            most.append(set(alive))

        def close(self) -> None:
            alive.remove(self.name)

    monkeypatch.setattr(end_to_end, "free_bytes", lambda device: 0)
    data = end_to_end.measure(TINY, Counted)
    assert most == [{"dense"}, {"nf4"}] and not alive and not data["together"]
    assert data["left_out"] == {"bitsandbytes": "not installed: no_such_package"}
    assert list(data["results"]) == ["dense", "nf4"]
    assert list(data["differences"]) == ["dequantized weights"]
    lines = end_to_end.tables(data).splitlines()
    (row,) = (line for line in lines if line.startswith("| bitsandbytes"))
    assert cells(row)[1] == "left out: not installed: no_such_package" and len(cells(row)) == 9


@pytest.mark.parametrize("method", ["start", "step", "decode"])
def test_end_to_end_leaves_a_peer_out_that_fails_and_raises_for_ours(method, monkeypatch) -> None:
    monkeypatch.setattr(end_to_end, "SETTLE", 0)

    class Fake:
        failing, closed = "dense", []

        def __init__(self, name, _) -> None:
            self.name = name
            if method == "start" and name == self.failing:
                raise runs.ContenderError("OutOfMemoryError: too large")

        def ask(self, asked, *_):
            if asked == method and self.name == self.failing:
                raise runs.ContenderError("OutOfMemoryError: too large")
            check = runs.Check(1.0, [1.0, 2.0], 0.1, [1.0, 2.0] if self.name == "nf4" else None, 1)
            return {"check": check, "step": 0.5, "decode": 0.25, "peak": None}.get(asked)

        def close(self) -> None:
            self.closed.append(self.name)

    data = end_to_end.measure(TINY, Fake)
    assert data["left_out"] == {"dense": "OutOfMemoryError: too large"}
    assert list(data["results"]) == ["bitsandbytes", "nf4"]
    assert data["results"]["nf4"]["step"] == {"median": 128, "p20": 128, "p80": 128}
    assert data["results"]["nf4"]["decode"]["8"]["median"] == 32
    assert sorted(Fake.closed) == sorted(NAMES[method == "start" :])
    Fake.failing, Fake.closed = "nf4", []
    with pytest.raises(runs.ContenderError, match="OutOfMemoryError: too large"):
        end_to_end.measure(TINY, Fake)
    assert len(Fake.closed) == 2 + (method != "start")


def test_what_a_contenders_process_raises_is_told() -> None:
    child = runs.Child("nf4", replace(TINY, dtype="fp8"))
    with pytest.raises(runs.ContenderError) as raised:
        child.ask("check")
    assert str(raised.value) == "KeyError: 'fp8'"
    assert "in __init__" in "".join(raised.value.__notes__)
    child.close()
    child = runs.Child("nf4", TINY)
    child.process.kill()
    with pytest.raises(runs.ContenderError, match="the process ended with exit status -9"):
        child.ask("check")
    child.close()


def test_contenders_hold_the_same_weights_and_checkpointing_changes_no_loss() -> None:
    dense, ours = (llama.make_model(name, TINY) for name in ("dense", "nf4"))
    layer = dense.get_base_model().model.layers[1].mlp.down_proj.base_layer
    packed = nf4.quantize(layer.weight.detach()).packed
    assert torch.equal(ours.model.layers[1].mlp.down_proj.packed, packed)
    first = dense.get_base_model().model.layers[0].mlp.down_proj.base_layer
    assert not torch.equal(first.weight, layer.weight)
    checks = [runs.Run("nf4", replace(TINY, checkpointing=c)).check() for c in (False, True)]
    assert checks[0] == checks[1]


def test_an_adapter_without_gradient_is_not_timed() -> None:
    layer = nf4.QLoRALinear(64, 32, r=4)
    for x, found in ((torch.zeros(1, 64), "zeros"), (torch.full((1, 64), math.nan), "none")):
        layer.zero_grad()
        layer(x).sum().backward()
        with pytest.raises(ValueError, match=rf"lora_[AB]: expected a gradient.*{found}"):
            contenders.check_gradients(layer)
    layer.zero_grad()
    layer(torch.randn(1, 64)).sum().backward()
    contenders.check_gradients(layer)


def test_the_largest_model_that_fits_is_chosen(monkeypatch) -> None:
    options = replace(TINY, device="cuda", length=2048)
    few = replace(options, size="8b", length=2)
    # 8.03e9 weights in bf16, and 42e6 elements of adapters with gradient and moments in fp32
    assert llama.needed_bytes(few) == pytest.approx(2 * 8.03e9 + 16 * 41.9e6, rel=0.01)
    saved = llama.needed_bytes(replace(options, size="8b", checkpointing=True))
    assert saved < 0.7 * llama.needed_bytes(replace(options, size="8b"))
    for free, size in ((80e9, "8b"), (24e9, "1b"), (1e6, "tiny")):
        monkeypatch.setattr(llama, "free_bytes", lambda device, free=free: free)
        assert llama.largest_size(options) == size
    assert llama.largest_size(TINY) == "30m"


def test_wrong_options_are_named(shell, capsys) -> None:
    for script, arguments, message in (
        (end_to_end, ["--length", "1"], "length: expected at least 2, got 1"),
        (end_to_end, ["--rounds", "0"], "argument --rounds: expected an integer of at least 1"),
        (smollm2, ["--windows", "few"], "expected an integer of at least 1, got few"),
        (smollm2, ["--threads", "0"], "expected an integer of at least 1, got 0"),
    ):
        shell(*arguments)
        with pytest.raises(SystemExit, match="2"):
            script.main()
        assert message in capsys.readouterr().err


@pytest.fixture
def sample(tiny_llama, monkeypatch):
    """Make a tiny random model and tokens, of sizes that bitsandbytes takes on a CPU."""
    monkeypatch.setattr(smollm2, "NEW_TOKENS", 5)

    def make(windows: int) -> smollm2.Sample:
        model = tiny_llama(intermediate_size=128)
        return smollm2.Sample("tiny", model, torch.randint(320, (windows, 64)))

    return make


@pytest.mark.parametrize(("dtype", "rounds"), [("fp32", 2), ("bf16", 1)])
def test_smollm2_times_both_and_writes_a_file(
    dtype, rounds, sample, shell, tmp_path, capsys
) -> None:
    out = tmp_path / "found.json"
    shell("--rounds", str(rounds), "--windows", "3", "--dtype", dtype, "--out", str(out))
    smollm2.main(sample)
    printed = capsys.readouterr().out
    data = json.loads(out.read_text(encoding="utf-8"))
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]
    assert data["format"] == "nf4-smollm2-1" and data["dtype"] == dtype
    assert data["layers"] == 14 and data["tokens"] == 3 * 64 and 0 <= data["tokens_alike"] <= 5
    assert data["perplexity"]["nf4"] == pytest.approx(data["perplexity"]["bitsandbytes"], rel=0.01)
    assert data["loss"]["nf4"] == pytest.approx(math.log(320), abs=0.2)
    assert list(data["results"]) == ["quantize", "perplexity", "train", "generate"]
    for row in data["results"].values():
        assert list(row) == ["nf4", "bitsandbytes"]
        assert all(0 < s["best"] <= s["median"] for s in row.values())
        assert all(0 < s["cpu_best"] <= s["cpu_median"] for s in row.values())
    assert printed == smollm2.tables(data)
    head, _, *rows = [cells(line) for line in printed.splitlines() if line.startswith("|")]
    assert head[1:4] == ["nf4", "bitsandbytes + PEFT", "theirs / ours"]
    assert [row[0] for row in rows] == [
        "quantize 14 linear layers",
        "perplexity of 192 tokens",
        "QLoRA training step, 1×256 tokens, r = 8",
        "generate 5 tokens, batch 1",
    ]
    best = data["results"]["quantize"]
    ratio = best["bitsandbytes"]["best"] / best["nf4"]["best"]
    assert rows[0][3] == f"{ratio:.2f}" and all(len(row) == 7 for row in rows)


def test_smollm2_prints_json(sample, shell, capsys, monkeypatch) -> None:
    monkeypatch.setattr(smollm2, "race", lambda *_: {})
    shell("--json")
    smollm2.main(sample)
    assert json.loads(capsys.readouterr().out)["rounds"] == 5


@pytest.mark.usefixtures("wrong_codes")
def test_smollm2_refuses_other_codes_than_bitsandbytes(sample, monkeypatch) -> None:
    monkeypatch.setattr(smollm2, "race", lambda *_: pytest.fail("a wrong result was timed"))
    with pytest.raises(ValueError, match="q_proj: expected bitsandbytes' codes, .*; not timed"):
        smollm2.measure(load=sample)


def test_smollm2_refuses_another_perplexity(sample, monkeypatch) -> None:
    found = smollm2.Contender.perplexity
    factor = {"nf4": 1.02, "bitsandbytes": 1.0}
    monkeypatch.setattr(smollm2.Contender, "perplexity", lambda c: factor[c.name] * found(c))
    with pytest.raises(ValueError, match="perplexity: expected within 0.01 nats of .*; not timed"):
        smollm2.measure(load=sample)


@pytest.mark.usefixtures("without_bitsandbytes")
def test_smollm2_needs_bitsandbytes(sample, shell, capsys) -> None:
    shell()
    with pytest.raises(SystemExit, match="2"):
        smollm2.main(sample)
    assert (
        "expected bitsandbytes and peft to compare with, not installed" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="windows: expected at least 1, got 0"):
        smollm2.measure(windows=0, load=sample)
