"""The comparison of methods on a tiny Llama: what each column means, the files, and mistakes."""

import hashlib
import io
import json
import re
import stat
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import nf4
from nf4.bench.harness import render, summary
from nf4.commands.cli import main
from nf4.commands.comparison import methods, one, plots, report, run
from nf4.commands.comparison.methods import METHODS
from nf4.commands.comparison.one import Request
from nf4.error.measured import perplexity
from nf4.tools import samples
from nf4.tools.training import LENGTH, batches

STEPS, R = 3, 4
HIDDEN, INNER, KEYS = 64, 96, 32  # the widths of the model, and of its keys and values
# in + out of q_proj, k_proj, v_proj, o_proj, and of gate_proj, up_proj, down_proj; two layers
WIDTHS = 2 * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KEYS) + 3 * (HIDDEN + INNER))
TRAINABLE = {
    "base": 0,
    "lora": R * WIDTHS,
    "qlora": R * WIDTHS,
    "t-few": 2 * (KEYS + KEYS + INNER),  # outputs of k_proj and v_proj, inputs of down_proj
    "adamix": 4 * R * WIDTHS,
}
TRAINED = [name for name in METHODS if name != "base"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux keeps a high-water mark")
SONNET = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


def silent(title: str, total: int):
    return nullcontext(SimpleNamespace(step=lambda remark="": None))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of tiny products wait for each other longer than they work, beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Save a random two-layer Llama with a byte-level tokenizer, as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={b: i for i, b in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": len(alphabet)}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **counts, eos_token_id=0, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("texts") / "sonnet.txt"
    file.write_text(SONNET * 80, encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def request_of(tiny, text, tmp_path_factory):
    """Return what to ask the process of a method for; its adapter goes to a new folder."""
    folder = tmp_path_factory.mktemp("adapters")

    def make(name: str, **changed) -> Request:
        adapter = folder / f"{name}-{len(list(folder.iterdir()))}"
        lr = METHODS[name].lr
        asked = Request(name, tiny, text, STEPS, R, "float32", 5, lr, "cpu", None, str(adapter))
        return replace(asked, **changed)

    return make


@pytest.fixture(scope="module")
def found(request_of) -> dict[str, SimpleNamespace]:
    """Measure each method in this process."""
    asked = {name: request_of(name) for name in METHODS}
    return {
        name: SimpleNamespace(adapter=Path(a.adapter), **vars(one.measure(a, silent)))
        for name, a in asked.items()
    }


def model_of(tiny: str, name: str):
    model, tokenizer = samples.load_model(tiny)
    return nf4.quantize_model(model) if METHODS[name].quantized else model, tokenizer


@pytest.mark.parametrize("name", METHODS)
def test_trainable_parameters_are_those_of_the_adapter(name, found) -> None:
    assert found[name].trainable == TRAINABLE[name]


@pytest.mark.parametrize("name", METHODS)
def test_perplexity_is_that_of_the_model_with_what_was_saved(name, found, tiny, text) -> None:
    model, tokenizer = model_of(tiny, name)
    _, held_out = samples.training_tokens(tokenizer, text)
    row = found[name]
    assert row.held_out_tokens == held_out.numel()
    assert row.perplexity_before == perplexity(model, held_out)
    if name == "base":
        assert row.perplexity_after == row.perplexity_before and row.losses == []
        assert (row.adapter_bytes, row.reloaded_logits_equal, row.step_seconds) == (None,) * 3
        assert not row.adapter.exists()
        return
    nf4.load_adapter(model, row.adapter)
    assert row.perplexity_after == perplexity(model, held_out) < row.perplexity_before
    assert row.reloaded_logits_equal
    assert row.adapter_bytes == sum(f.stat().st_size for f in row.adapter.iterdir())


def test_mixture_is_saved_as_one_lora(found) -> None:
    mixture, lora = (found[name] for name in ("adamix", "lora"))
    assert mixture.trainable == 4 * lora.trainable
    # The configs differ by some bytes at most; the tensors are as many numbers in fp32
    assert abs(mixture.adapter_bytes - lora.adapter_bytes) < 200
    assert mixture.adapter_bytes > 4 * lora.trainable


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_on_the_same_batches(name, found, tiny, text) -> None:
    model, tokenizer = model_of(tiny, name)
    tokens, _ = samples.training_tokens(tokenizer, text)
    data = batches(tokens, STEPS, 5)
    assert data.shape == (STEPS, 1, LENGTH) and not torch.equal(data[0], data[1])
    assert found[name].batches == hashlib.sha256(data.numpy().tobytes()).hexdigest()
    if name != "base":
        # Every adapter starts as no change at all
        assert len(found[name].losses) == STEPS
        with torch.no_grad():
            loss = model(data[0], labels=data[0]).loss.item()
        assert found[name].losses[0] == pytest.approx(loss, rel=1e-6)


def test_consistency_is_of_two_draws_and_of_adamix_alone(found) -> None:
    assert [name for name in METHODS if found[name].consistency] == ["adamix"]
    first, *others = found["adamix"].consistency
    assert len(others) == STEPS - 1
    # Modules differ in lora_A, which nothing comes through while lora_B is zero
    assert first == 0 and all(value > 0 for value in others)


class Passes(torch.nn.Module):
    """A model that returns given logits, in turn."""

    def __init__(self, *logits: torch.Tensor) -> None:
        super().__init__()
        self.left = list(logits)

    def forward(self, batch, labels=None, use_cache=None):
        logits = self.left.pop(0)
        loss = None if labels is None else logits.square().sum()
        return SimpleNamespace(logits=logits, loss=loss)


def test_objective_adds_the_consistency_of_two_passes() -> None:
    first, second = (torch.randn(1, 4, 7, requires_grad=True) for _ in range(2))
    objective = methods.Objective(Passes(first, second), torch.float32, two_draws=True)
    batch = torch.zeros(1, 4, dtype=torch.int64)
    loss = objective(batch, labels=batch).loss
    task, apart = first.square().sum(), nf4.losses.consistency_loss(first, second)
    assert torch.equal(loss, task + apart) and apart > 0
    assert objective.losses == [task] and objective.consistency == [apart]
    loss.backward()
    assert first.grad.any() and second.grad.any()


@pytest.mark.parametrize("name", ["qlora", "adamix"])
def test_equal_seeds_give_equal_losses_and_others_do_not(name, found, request_of) -> None:
    again = one.measure(request_of(name), silent)
    assert (again.losses, again.consistency) == (found[name].losses, found[name].consistency)
    assert again.perplexity_after == found[name].perplexity_after
    other = one.measure(request_of(name, seed=6, lr=1e-12), silent)
    assert other.batches != again.batches and other.losses[0] != again.losses[0]
    # At a rate of nearly nothing nothing is learned
    assert other.perplexity_after == pytest.approx(other.perplexity_before, rel=1e-6)


def test_bytes_of_the_model_are_those_of_its_weights(found, tiny) -> None:
    dense, _ = samples.load_model(tiny)
    assert found["lora"].model_bytes == 4 * sum(p.numel() for p in dense.parameters())
    quantized = sum(t.nbytes for t in nf4.quantize_model(dense).state_dict().values())
    for name in METHODS:
        assert name == "lora" or found[name].model_bytes == quantized < found["lora"].model_bytes


def test_bfloat16_trains_adapters_in_fp32_on_bf16_weights(found, request_of) -> None:
    half = one.measure(request_of("lora", dtype="bfloat16"), silent)
    assert half.model_bytes == found["lora"].model_bytes / 2
    assert half.trainable == found["lora"].trainable and half.reloaded_logits_equal
    assert half.adapter_bytes > 4 * half.trainable
    # bf16 rounds to 8 bits: logits of about 1 by some 2^-9, of which a mean loss sees less
    assert half.losses == pytest.approx(found["lora"].losses, abs=2**-8)
    assert half.losses != found["lora"].losses


@LINUX
def test_peak_counts_model_adapter_and_what_steps_hold(found) -> None:
    for name in TRAINED:
        row = found[name]
        logits = 4 * LENGTH * 256
        assert row.peak_missing is None
        assert row.peak_bytes > row.model_bytes + 4 * row.trainable + 2 * logits
        assert row.peak_bytes < 1e8, "not the interpreter's"
    assert found["base"].peak_bytes is None and found["base"].peak_missing == "nothing is trained"


@LINUX
def test_peak_of_is_the_most_held_at_once() -> None:
    def hold() -> None:
        for _ in range(3):
            np.ones(5_000_000)  # 40 MB of float64, given back each time

    # Linux counts pages by processor, and so some late; the process may take others meanwhile
    assert one.peak_of(hold, torch.device("cpu")) == pytest.approx(40e6, abs=2e6)


def test_peak_is_none_where_nothing_tells_it_and_the_work_is_done_once(
    request_of, monkeypatch
) -> None:
    calls = []
    monkeypatch.setattr(one, "cpu_peak", lambda function: None)
    assert one.peak_of(lambda: calls.append(1), torch.device("cpu")) is None and calls == [1]
    row = one.measure(request_of("t-few"), silent)
    assert row.peak_bytes is None and "no mark" in row.peak_missing and len(row.losses) == STEPS


@pytest.mark.parametrize("error", [KeyError, OSError, ValueError], ids=lambda e: e.__name__)
def test_peak_of_raises_what_the_work_raises(error) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise error("no")

    with pytest.raises(error, match="no"):
        one.peak_of(fail, torch.device("cpu"))
    assert calls == [1]


def test_seconds_are_of_the_steps_after_the_first(found, request_of, monkeypatch) -> None:
    spread = one._spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert spread == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    counted = []
    monkeypatch.setattr(one, "_spread", lambda seconds: counted.append(len(seconds)) or spread)
    assert one.measure(request_of("t-few"), silent).step_seconds == spread
    assert counted == [STEPS - 1]
    for name in TRAINED:
        s = found[name].step_seconds
        assert 0 < s["p20"] <= s["median"] <= s["p80"] < 10


def test_an_adapter_that_reloads_otherwise_is_told(request_of, monkeypatch) -> None:
    load = nf4.load_adapter

    def wrong(model, path) -> None:
        load(model, path)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(1.0)

    monkeypatch.setattr(nf4, "load_adapter", wrong)
    assert one.measure(request_of("t-few"), silent).reloaded_logits_equal is False


@pytest.fixture(scope="module")
def shell(tiny, text, tmp_path_factory) -> SimpleNamespace:
    """Compare three methods on the shell, one of which diverges."""
    folder = tmp_path_factory.mktemp("shell")
    out, results = folder / "new" / "out", folder / "found.json"
    arguments = ["compare", tiny, "--text", text, "--steps", str(STEPS), "--r", str(R)]
    arguments += ["--methods", "base", "lora", "qlora", "--seed", "5", "--lr", "lora=1e30"]
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as complained:
        status = main([*arguments, "--out", str(out), "--results", str(results)])
    data = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    texts = {"printed": printed.getvalue(), "complained": complained.getvalue()}
    return SimpleNamespace(status=status, folder=folder, out=out, data=data, **texts)


def test_shell_reports_what_came_through_beside_what_failed(shell, found) -> None:
    assert shell.status == 1
    assert [list(shell.data[key]) for key in ("methods", "failed")] == [["base", "qlora"], ["lora"]]
    (complaint,) = (s for s in shell.complained.splitlines() if s.startswith("nf4 compare:"))
    assert re.fullmatch(r"nf4 compare: lora: ValueError: .*finite values.*", complaint)
    for name in ("base", "qlora"):  # a process of its own gives what this one does
        row = shell.data["methods"][name]
        for key in ("trainable", "losses", "perplexity_before", "perplexity_after", "batches"):
            assert row[key] == getattr(found[name], key), key
    assert "QLoRA: fine-tune" in shell.complained and f"{shell.out}\n" in shell.complained


def test_folder_has_tables_picture_and_adapters_and_nothing_else(shell) -> None:
    assert sorted(p.name for p in shell.folder.iterdir()) == ["found.json", "new"]
    assert [p.name for p in shell.out.parent.iterdir()] == ["out"], "nothing is left beside it"
    names = ["adapters", "compare.json", "compare.png", "table.md"]
    assert sorted(p.name for p in shell.out.iterdir()) == names
    assert [p.name for p in (shell.out / "adapters").iterdir()] == ["qlora"]
    assert (shell.out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (shell.out / "table.md").read_text(encoding="utf-8") == shell.printed
    files = (shell.out / "compare.json", shell.folder / "found.json")
    assert len({path.read_bytes() for path in files}) == 1


def test_file_says_under_what_circumstances_and_no_path(shell) -> None:
    data = shell.data
    assert data["format"] == "nf4-compare-1" and data["versions"]["torch"] == torch.__version__
    assert (data["model"], data["text"]) == ("tiny", "sonnet.txt")
    assert (data["steps"], data["batch"], data["length"], data["r"]) == (STEPS, 1, LENGTH, R)
    assert data["threads"] == 1 and data["device"].endswith("1 thread") and data["date"]
    assert str(shell.folder.parent) not in json.dumps(data)


def test_tables_have_a_line_a_method(shell, tmp_path) -> None:
    row = shell.data["methods"]["qlora"]
    after, before = (row[f"perplexity_{when}"] for when in ("after", "before"))
    lines = shell.printed.splitlines()
    (line,) = (s for s in lines if s.startswith("| QLoRA |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == f"{TRAINABLE['qlora']:,}" and cells[5] == f"{before:.2f} → {after:.2f}"
    assert cells[6:] == [f"{row['adapter_bytes'] / 1e3:.1f} kB", "equal", "0.002"]
    assert "| 4-bit base | 0 |" in shell.printed
    assert any(s.startswith("- LoRA, dense: failed: ValueError") for s in lines)
    assert "- 4-bit base, no peak memory: nothing is trained." in lines
    (tmp_path / "compare-x.json").write_text(json.dumps(shell.data), encoding="utf-8")
    assert shell.printed.strip() in render.page(tmp_path)
    short = summary.methods(tmp_path)
    assert f"{shell.data['device']}:\n" in short
    assert f"| QLoRA | {TRAINABLE['qlora']:,} |" in short and f"| {after:.2f} |" in short
    assert "the same batches in the same order" in shell.printed
    rows = {name: {**row, "batches": name} for name, row in shell.data["methods"].items()}
    assert "different batches" in report.tables({**shell.data, "methods": rows})


def test_picture_shows_each_method_where_it_came_to(shell) -> None:
    data = shell.data
    (left, right) = plots.picture(data).axes
    row = data["methods"]["qlora"]
    (point,) = left.collections
    assert point.get_offsets().tolist() == [[row["trainable"], row["perplexity_after"]]]
    assert left.get_xscale() == "log"
    (line,) = left.lines
    assert set(line.get_ydata()) == {row["perplexity_before"]}
    assert line.get_label().startswith("4-bit, not trained: ")
    assert list(right.lines[0].get_ydata()) == row["losses"]
    (left, right) = plots.picture({**data, "methods": {"base": data["methods"]["base"]}}).axes
    assert not left.collections and len(left.lines) == 1 and not right.lines


@pytest.fixture
def answers(monkeypatch, found):
    """Let methods be answered for without a process: what was measured here, or a reason."""

    def set_answers(**failed: str) -> list[Request]:
        asked = []

        def run_one(request: Request, progress) -> dict:
            asked.append(request)
            if request.method in failed:
                return {"failed": failed[request.method]}
            row = vars(found[request.method])
            return {"found": {k: v for k, v in row.items() if k != "adapter"}}

        monkeypatch.setattr(run, "run_one", run_one)
        return asked

    return set_answers


def test_defaults_are_every_method_at_its_rate(answers, tiny, tmp_path, monkeypatch, capsys):
    asked = answers()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nf4-compare").mkdir()
    assert main(["compare", tiny, "--lr", "qlora=1e-3", "--lr", "t-few=.5", "--json"]) == 0
    assert [r.method for r in asked] == list(METHODS)
    rates = {name: method.lr for name, method in METHODS.items()}
    assert {r.method: r.lr for r in asked} == {**rates, "qlora": 1e-3, "t-few": 0.5}
    assert {(r.steps, r.r, r.dtype, r.seed, r.text) for r in asked} == {(40, 8, "float32", 0, None)}
    data = json.loads(capsys.readouterr().out)
    assert list(data["methods"]) == list(METHODS) and data["text"] == run.SHAKESPEARE
    assert (tmp_path / "nf4-compare-2" / "compare.png").is_file()


def test_nothing_is_written_if_every_method_fails(answers, tiny, tmp_path, capsys) -> None:
    answers(base="no", qlora="out of memory")
    out = tmp_path / "out"
    arguments = ["compare", tiny, "--methods", "base", "qlora", "--out", str(out)]
    assert main([*arguments, "--results", str(tmp_path / "found.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and list(tmp_path.iterdir()) == []
    assert printed.err == "nf4 compare: base: no\nnf4 compare: qlora: out of memory\n"


@pytest.fixture
def child(monkeypatch, tmp_path, request_of):
    """Run a shell script instead of a method's process."""

    def run_script(body: str, progress=silent) -> dict:
        script = tmp_path / "child"
        script.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(script))
        return run.run_one(request_of("base"), progress)

    return run_script


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("cat > /dev/null; exit 3", "its process ended with exit status 3"),
        (
            "cat > /dev/null; echo first >&2; echo 'no memory' >&2; kill -9 $$",
            "its process ended with exit status -9: no memory",
        ),
        ("exec <&-; exit 4", "its process ended with exit status 4"),
        ('echo \'{"failed": "ValueError: no"}\'; exit 1', "ValueError: no"),
    ],
    ids=["ends", "killed", "reads_nothing", "tells"],
)
def test_a_process_that_fails_gives_one_line(body, reason, child) -> None:
    assert child(body) == {"failed": reason}


def test_a_process_is_ended_with_what_waits_for_it(child, tmp_path) -> None:
    def interrupt(title: str, total: int):
        assert (title, total) == ("x", 2)
        raise KeyboardInterrupt

    pid = tmp_path / "pid"
    with pytest.raises(KeyboardInterrupt):
        child(f'echo $$ > {pid}; echo \'{{"bar": ["x", 2]}}\'; exec sleep 600', interrupt)
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


BAD = {
    "unknown_method": (["--methods", "lora", "dora"], "methods: expected some of base, lora"),
    "method_twice": (["--methods", "lora", "lora"], "each once, got ['lora', 'lora']"),
    "steps_zero": (["--steps", "0"], "steps: expected at least 2 (one is not timed), got 0"),
    "one_step": (["--steps", "1"], "steps: expected at least 2"),
    "no_rank": (["--r", "0"], "r: expected at least 1, got 0"),
    "no_threads": (["--threads", "0"], "threads: expected at least 1, got 0"),
    "dtype": (["--dtype", "int8"], "dtype: expected one of float32, bfloat16, got 'int8'"),
    "device": (["--device", "abacus"], "device: expected cuda, cuda:1, … or cpu, got 'abacus'"),
    "no_device": (["--device", "meta"], "device: expected cuda, cuda:1, … or cpu, got 'meta'"),
    "rate_alone": (["--lr", "1e-3"], "lr: expected METHOD=VALUE, VALUE a number, got '1e-3'"),
    "rate_negative": (["--lr", "lora=-1"], "lr: expected a positive number for lora, got -1.0"),
    "rate_nan": (["--lr", "lora=nan"], "lr: expected a positive number for lora, got nan"),
    "rate_twice": (["--lr", "lora=1", "--lr", "lora=2"], "lr: expected one value for lora"),
    "rate_of_base": (["--lr", "base=1"], "lr: expected a method that is trained here, got 'base'"),
    "rate_of_another": (["--methods", "lora", "--lr", "qlora=1"], "trained here, got 'qlora'"),
    "no_model": (["../none"], "model: expected a folder, a file or one of"),
    "no_text": (["--text", "none.txt"], "text: expected a UTF-8 text file, none.txt does not"),
    "out_exists": (["--out", "."], "out: expected a folder that does not exist yet, . does"),
    "results_folder": (["--results", "."], "results: expected a file, . is a folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistake_is_one_line_and_status_2(case, tiny, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    try:
        status = main(["compare", *([tiny] if arguments[0][0] == "-" else []), *arguments])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("nf4 compare: ") and message in printed.err
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_help_names_every_method(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert f"{', '.join(METHODS)} (default: all)" in " ".join(capsys.readouterr().out.split())
