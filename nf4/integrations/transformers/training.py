"""Let transformers' Trainer go on from its checkpoints of a model with this package's adapters."""

from typing import Any

from transformers import Trainer

from nf4.integrations.transformers.saving import restoring


def _checkpoint(trainer: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> str:
    return resume_from_checkpoint


def _best(trainer: Any) -> str:
    folder: str = trainer.state.best_model_checkpoint
    return folder


def install() -> None:
    """Wrap what loads a checkpoint; once."""
    for name, folder_of in (("_load_from_checkpoint", _checkpoint), ("_load_best_model", _best)):
        load = getattr(Trainer, name)
        if not hasattr(load, "knows_nf4"):
            setattr(Trainer, name, restoring(load, folder_of))


install()
