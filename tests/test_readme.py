"""The README's examples run as they stand, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_readme_examples_run_in_order(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert len(BLOCKS) == 6
    for line in (
        "4.127 bits per weight)",
        "0.092 of the norm, 20.7 dB",
        "['bias', 'lora_A', 'lora_B']",
    ):
        assert line in printed and line in README
    for name in ("adapter/adapter_config.json", "quantized/config.json", "peft-adapter"):
        assert (tmp_path / name).exists(), name


def test_readme_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"])
def test_documents_are_there(name) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8")) > 200
