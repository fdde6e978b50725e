"""Map kernels/ to nf4.kernels, bench/ to nf4.bench; describe the wheel; the rest: pyproject.toml.

The wheel's description is README.md without what only a checkout can show: of pictures the captions
stay, of links to files the text. With a public address they could be links again.
"""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
_TARGET = r"\((?!https?:|#)[^)\s]*\)"  # of a link, relative
CAPTIONED = re.sub(rf"!\[([^\]]*)\]{_TARGET}", r"*\1: a picture in the checkout.*\n", README)

setup(
    packages=[
        "nf4",
        "nf4.reference",
        "nf4.cpu",
        "nf4.gpu",
        "nf4.ops",
        "nf4.layers",
        "nf4.adapters",
        "nf4.models",
        "nf4.models.kinds",
        "nf4.files",
        "nf4.error",
        "nf4.error.report",
        "nf4.integrations",
        "nf4.integrations.peft",
        "nf4.integrations.transformers",
        "nf4.commands",
        "nf4.commands.demo",
        "nf4.commands.comparison",
        "nf4.commands.planning",
        "nf4.tools",
        "nf4.kernels",
        "nf4.bench",
        "nf4.bench.harness",
        "nf4.bench.model",
        "nf4.bench.gpu_day",
    ],
    long_description=re.sub(rf"(?<!!)\[([^\[\]]*)\]{_TARGET}", r"\1", CAPTIONED),
    long_description_content_type="text/markdown",
    package_dir={"nf4": "nf4", "nf4.kernels": "kernels", "nf4.bench": "bench"},
)
