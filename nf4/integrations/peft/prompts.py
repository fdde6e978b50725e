"""PEFT's prompt, prefix and P-tuning on models whose embeddings of tokens are in four bits.

PEFT looks for the embeddings among a model's parameters, by their size, and takes the name of the
parameter without its ``.weight`` for that of the module.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel
from torch import nn

from nf4.integrations.peft.parameters import named_otherwise
from nf4.integrations.wrapping import wrap_once
from nf4.layers.embedding import EmbeddingNF4


def install() -> None:
    """Let PEFT find embeddings in four bits; once."""
    wrap_once(PeftModel, "_setup_prompt_encoder", _finding)


def _finding(shipped: Callable[..., None]) -> Callable[..., None]:
    def setup(self: Any, *args: Any, **options: Any) -> None:
        with _embeddings_by_weight(self.base_model):
            shipped(self, *args, **options)

    return setup


def _embeddings_by_weight(model: nn.Module) -> AbstractContextManager[None]:
    """Let the rows of 4-bit embeddings have a dense weight's name within a ``with`` block."""
    modules = list(model.modules())
    if not any(isinstance(module, EmbeddingNF4) for module in modules):
        return nullcontext()
    return named_otherwise((m for m in modules if "named_parameters" not in vars(m)), _named)


def _named(module: nn.Module, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
    rows = {id(m.packed) for m in module.modules() if isinstance(m, EmbeddingNF4)}
    for name, parameter in nn.Module.named_parameters(module, *args, **options):
        if id(parameter) in rows:
            name = name.removesuffix("packed") + "weight"
        yield name, parameter
