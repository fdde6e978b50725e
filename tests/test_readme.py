"""The README's examples run as they stand, and its links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import nf4

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_readme_examples_run_in_order(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in (b for b in BLOCKS if SMOLLM2 not in b):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert len(BLOCKS) == 11
    for line in (
        "4.127 bits per weight)",
        "0.092 of the norm, 20.7 dB",
        "0.083",
        "['bias', 'adapters.default.lora_A', 'adapters.default.lora_B']",
    ):
        assert line in printed and line in README
    for name in ("adapter/adapter_config.json", "quantized/config.json", "peft-adapter"):
        assert (tmp_path / name).exists(), name


@pytest.mark.demo
@pytest.mark.filterwarnings("default")
def test_readme_script_for_who_comes_from_bitsandbytes(tmp_path, monkeypatch, capsys) -> None:
    """The script as it stands but for the model's name, which is a folder: there is no network."""
    from nf4.tools.samples import load_model

    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(None)
    model.to(torch.bfloat16).save_pretrained("smollm2")
    tokenizer.save_pretrained("smollm2")
    (block,) = (b for b in BLOCKS if SMOLLM2 in b)
    names: dict[str, Any] = {}
    exec(compile(block.replace(SMOLLM2, "smollm2"), "README.md", "exec"), names)
    losses = [row["loss"] for row in names["trainer"].state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "sonnet" / "adapter_model.safetensors").is_file()
    layers = [m for m in names["base"].modules() if isinstance(m, nf4.LinearNF4)]
    assert len(layers) == 210
    assert "Shall I compare thee" in capsys.readouterr().out


def test_readme_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"])
def test_documents_are_there(name) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8")) > 200
