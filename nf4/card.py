"""The model card of a folder with 4-bit weights: what it is, and the lines that open it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "README.md"
_SECTION = """\
## 4-bit weights

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


def add_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a model card into a folder, or a section into the one that is there.

    Args:
        folder: with weights in four bits.
        config: the ``quantization_config`` of its ``config.json``.
    """
    section = _SECTION.format(
        block_size=config["block_size"],
        double=", scales quantized too" if config["double_quant"] else "",
    )
    file = folder / NAME
    if not file.is_file():
        head = "---\nlibrary_name: transformers\ntags:\n- nf4\n- 4-bit\n---\n\n"
        file.write_text(head + section, encoding="utf-8")
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    if "## 4-bit weights" not in text:
        file.write_text(f"{text.rstrip()}\n\n{section}", encoding="utf-8")
