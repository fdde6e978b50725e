"""The README's and the guides' examples run as they stand, and their links lead somewhere."""

import argparse
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import nf4
from nf4.commands import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = sorted((ROOT / "notebooks/guides").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
BITSANDBYTES = ROOT / "notebooks/guides/bitsandbytes.md"
SEVERAL_GPUS = ROOT / "notebooks/guides/several_gpus.md"  # tests/distributed/test_guide.py runs it
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
FENCE = r"^```{}\n(.*?)^```$"
# What a page prints, and says that it does
PRINTED = {
    "quantization_error.md": ["4.127 bits per weight)", "0.092 of the norm, 20.7 dB", "0.083"],
    "how_it_is_built.md": ["['bias', 'adapters.default.lora_A', 'adapters.default.lora_B']"],
}
WRITTEN = {
    "README.md": ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
    "bitsandbytes.md": ["theirs/config.json"],
    "peft_and_trainer.md": [
        "adapter/adapter_config.json",
        "quantized/config.json",
        "peft-adapter",
        "trainer-adapter/adapter_config.json",
    ],
    "serving.md": ["quantized/config.json", "exported/config.json"],
    "trl.md": ["adapter/adapter_config.json"],
}


def blocks(page: Path, *languages: str) -> list[str]:
    """Return what stands in a page's fences of these languages, in order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(FENCE.format(f"(?:{'|'.join(languages)})"), text, flags=re.S | re.M)


def commands() -> list[tuple[str, str]]:
    """Return every command of every page, without its comment."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh", "console"):
            lines = (line.removeprefix("$ ") for line in block.splitlines())
            found += [(page.name, " ".join(shlex.split(line, comments=True))) for line in lines]
    return [(page, command) for page, command in found if command]


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_llama, tokenizer) -> Path:
    """A temporary folder to be in, where the model of the pages is a tiny one."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(intermediate_size=128).save_pretrained("model")
    tokenizer.save_pretrained("model")
    return tmp_path


# Of the Trainer and of TRL, on a machine without a GPU
@pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*deprecated")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page != SEVERAL_GPUS and blocks(page, "python")],
    ids=lambda page: page.stem,
)
def test_examples_of_a_page_run_in_order(page, folder, capsys) -> None:
    names: dict[str, object] = {}
    for block in (b for b in blocks(page, "python") if SMOLLM2 not in b):
        exec(compile(block, page.name, "exec"), names)
    printed, text = capsys.readouterr().out, page.read_text(encoding="utf-8")
    for line in PRINTED.get(page.name, ()):
        assert line in printed and line in text
    for name in WRITTEN.get(page.name, ()):
        assert (folder / name).exists(), name


@pytest.mark.demo
@pytest.mark.filterwarnings("default")
def test_script_for_who_comes_from_bitsandbytes(tmp_path, monkeypatch, capsys) -> None:
    """The script as it stands but for the model's name, which is a folder: there is no network."""
    from nf4.tools.samples import load_model

    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(None)
    model.to(torch.bfloat16).save_pretrained("smollm2")
    tokenizer.save_pretrained("smollm2")
    (block,) = (b for b in blocks(BITSANDBYTES, "python") if SMOLLM2 in b)
    names: dict[str, Any] = {}
    exec(compile(block.replace(SMOLLM2, "smollm2"), BITSANDBYTES.name, "exec"), names)
    losses = [row["loss"] for row in names["trainer"].state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "sonnet" / "adapter_model.safetensors").is_file()
    layers = [m for m in names["base"].modules() if isinstance(m, nf4.LinearNF4)]
    assert len(layers) == 210
    assert "Shall I compare thee" in capsys.readouterr().out


@pytest.mark.parametrize(("page", "command"), commands())
def test_command_of_a_page_is_one(page, command) -> None:
    """What would take minutes, a GPU or a network is not run: its names and options are known."""
    first, *rest = command.split()
    if first == "nf4" or "nf4.commands.cli" in rest:
        arguments = rest if first == "nf4" else rest[rest.index("nf4.commands.cli") + 1 :]
        assert isinstance(cli._parser().parse_args(arguments), argparse.Namespace)
    elif first == "make":
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{rest[0]}:", targets, flags=re.M), command
    elif first == "python":
        assert (ROOT / rest[0]).is_file(), command
    else:
        assert [first, *rest[:1]] == ["pip", "install"], command
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert rest[1].strip(".[]") in extras["project"]["optional-dependencies"]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180
    (example,) = blocks(ROOT / "README.md", "python")
    assert sum(bool(line) for line in example.splitlines()) == 8
    assert len(re.findall(r"^!\[", README, flags=re.M)) == 1
    for guide in GUIDES:
        assert f"(notebooks/guides/{guide.name})" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page) -> None:
    for target, mark in re.findall(
        r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")
    ):
        if target.startswith("https://"):
            continue
        found = page.parent / target if target else page
        assert found.exists(), target
        if mark:
            heads = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.M)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert mark in slugs, f"{target}#{mark}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"])
def test_documents_are_there(name) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8")) > 200
