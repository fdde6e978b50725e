"""Let transformers' Trainer go on from its checkpoints of a model with this package's adapters."""

from functools import partial
from typing import Any

from transformers import Trainer

from nf4.integrations.transformers.saving import restoring
from nf4.integrations.wrapping import wrap_once


def _checkpoint(trainer: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> str:
    return resume_from_checkpoint


def _best(trainer: Any) -> str:
    folder: str = trainer.state.best_model_checkpoint
    return folder


def install() -> None:
    """Wrap what loads a checkpoint; once."""
    for name, folder_of in (("_load_from_checkpoint", _checkpoint), ("_load_best_model", _best)):
        wrap_once(Trainer, name, partial(restoring, folder_of=folder_of))


install()
