"""``num_parameters()`` of models with 4-bit layers counts weights, as of the dense model."""

import functools
from typing import Any

from transformers import PreTrainedModel

from nf4.integrations.counting import uncounted


def install() -> None:
    """Let every transformers model count 4-bit weights by their elements; once."""
    shipped = PreTrainedModel.num_parameters
    if hasattr(shipped, "knows_nf4"):
        return

    @functools.wraps(shipped)
    def num_parameters(
        self: Any, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        found: int = shipped(self, only_trainable, exclude_embeddings)
        return found if only_trainable else found + uncounted(self, not exclude_embeddings)

    num_parameters.knows_nf4 = True  # type: ignore[attr-defined]
    PreTrainedModel.num_parameters = num_parameters
