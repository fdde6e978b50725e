"""The model card of a folder that is made here: what it is, and the lines that open it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nf4.tools.paths import write_file

NAME = "README.md"
_HEAD = "---\nlibrary_name: transformers\ntags:\n- nf4\n- 4-bit\n---\n\n"
_TITLE = "## 4-bit weights"
_MERGED_TITLE = "## Merged weights"
_SECTION, _MERGED_SECTION = (
    re.compile(rf"^{title}\n.*?(?=^#{{1,2}} |\Z)", re.MULTILINE | re.DOTALL)
    for title in (_TITLE, _MERGED_TITLE)
)
_MERGED_HEAD = "---\nlibrary_name: transformers\n---\n\n"
_MERGED = """\
The weights of `{base}`{bits}, with the adapter `{adapter}` ({kind}) folded into them by
`nf4 merge`: dense, in {dtype}. They open with transformers, as any model does.
"""
_OURS = """\
The linear layers of this model hold their weights in 4-bit NormalFloat, in blocks of
{block_size}{double}. They open with the package nf4:

```python
import nf4
from transformers import AutoModelForCausalLM  # or the class of this model

model = AutoModelForCausalLM.from_pretrained("this folder or repository")
```

transformers without nf4 refuses them ("size mismatch"). For programs that know bitsandbytes' files,
`nf4 export --format bitsandbytes SOURCE TARGET` writes the same weights as such.
"""
_BITSANDBYTES = """\
The linear layers of this model hold their weights in 4-bit NormalFloat, in the files of
bitsandbytes. They open with transformers where bitsandbytes is installed, as any model does.
"""


def add_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a model card into a folder, or a section into the one that is there.

    Args:
        folder: with weights in four bits.
        config: the ``quantization_config`` of its ``config.json``, ours or bitsandbytes'.
    """
    text = _BITSANDBYTES
    if config["quant_method"] == "nf4":
        double = ", scales quantized too" if config["double_quant"] else ""
        text = _OURS.format(block_size=config["block_size"], double=double)
    file = folder / NAME
    held = _read(file)
    _put(file, held, _HEAD, _SECTION, f"{_TITLE}\n\n{text}")


def add_merged_card(folder: Path, said: Mapping[str, str]) -> None:
    """Write a model card into a folder of merged weights, or a section into the one that is there.

    A section of 4-bit weights, which are dense now, goes.

    Args:
        folder: with dense weights.
        said: base, bits, adapter, kind and dtype, in words.
    """
    file = folder / NAME
    held = _read(file)
    if held is not None:
        held = _SECTION.sub("", held, count=1).replace(_HEAD, _MERGED_HEAD)
        held = held if held.strip() != _MERGED_HEAD.strip() else None
    _put(file, held, _MERGED_HEAD, _MERGED_SECTION, f"{_MERGED_TITLE}\n\n{_MERGED.format(**said)}")


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _put(file: Path, held: str | None, head: str, known: re.Pattern[str], section: str) -> None:
    """Write a card: head and section, or the section in or after what is there."""
    if held is None:
        write_file(file, head + section)
    elif known.search(held):
        write_file(file, known.sub(lambda _: f"{section}\n", held, count=1).rstrip() + "\n")
    else:
        write_file(file, f"{held.rstrip()}\n\n{section}")
