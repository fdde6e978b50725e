"""The model card of a folder with 4-bit weights: what it is, and the lines that open it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nf4.tools.paths import write_file

NAME = "README.md"
_HEAD = "---\nlibrary_name: transformers\ntags:\n- nf4\n- 4-bit\n---\n\n"
_TITLE = "## 4-bit weights"
_SECTION = re.compile(rf"^{_TITLE}\n.*?(?=^#{{1,2}} |\Z)", re.MULTILINE | re.DOTALL)
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
    section = f"{_TITLE}\n\n{text}"
    file = folder / NAME
    if not file.is_file():
        write_file(file, _HEAD + section)
        return
    held = file.read_text(encoding="utf-8", errors="replace")
    if _SECTION.search(held):
        write_file(file, _SECTION.sub(lambda _: f"{section}\n", held, count=1).rstrip() + "\n")
    else:
        write_file(file, f"{held.rstrip()}\n\n{section}")
