"""``num_parameters()`` of models with 4-bit layers counts weights, as of the dense model."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from nf4.integrations.counting import uncounted
from nf4.integrations.wrapping import wrap_once


def install() -> None:
    """Let every transformers model count 4-bit weights by their elements; once."""
    wrap_once(PreTrainedModel, "num_parameters", _counting)


def _counting(shipped: Callable[..., int]) -> Callable[..., int]:
    def num_parameters(
        self: Any, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        found = shipped(self, only_trainable, exclude_embeddings)
        return found if only_trainable else found + uncounted(self, not exclude_embeddings)

    return num_parameters
