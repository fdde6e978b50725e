"""PEFT's prompt, prefix and P-tuning on models whose embeddings of tokens are in four bits.

PEFT looks for the embeddings among a model's parameters, by their size, and takes the name of the
parameter without its ``.weight`` for that of the module.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from nf4.layers.embedding import EmbeddingNF4


def install() -> None:
    """Let PEFT find embeddings in four bits; once."""
    shipped = PeftModel._setup_prompt_encoder
    if hasattr(shipped, "knows_nf4"):
        return

    @functools.wraps(shipped)
    def setup(self: Any, *args: Any, **options: Any) -> None:
        with _embeddings_by_weight(self.base_model):
            shipped(self, *args, **options)

    setup.knows_nf4 = True  # type: ignore[attr-defined]
    PeftModel._setup_prompt_encoder = setup


@contextmanager
def _embeddings_by_weight(model: nn.Module) -> Iterator[None]:
    """Let the rows of 4-bit embeddings have a dense weight's name within a ``with`` block."""
    if not any(isinstance(module, EmbeddingNF4) for module in model.modules()):
        yield
        return
    holders = [m for m in model.modules() if "named_parameters" not in vars(m)]
    for module in holders:
        module.named_parameters = functools.partial(_named, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in holders:
            del module.named_parameters


def _named(module: nn.Module, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
    rows = {id(m.packed) for m in module.modules() if isinstance(m, EmbeddingNF4)}
    for name, parameter in nn.Module.named_parameters(module, *args, **options):
        if id(parameter) in rows:
            name = name.removesuffix("packed") + "weight"
        yield name, parameter
