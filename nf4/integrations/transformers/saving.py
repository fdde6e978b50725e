"""What ``save_pretrained`` writes of a model with this package's layers, and adapters read again.

The base is written without the adapters on it. These lie beside it as PEFT's two files: the active
adapter in the folder itself, others in folders called by their names, as PEFT has it. A folder with
both opens as a whole: transformers loads the base, and PEFT's adapter on it.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from nf4.adapters.layer import AdaptedLayer, adapted_layers
from nf4.files.adapters import CONFIG_NAME, AdapterFiles
from nf4.files.card import add_card
from nf4.files.checkpoint import adapter_files
from nf4.files.loading import restore_adapter
from nf4.integrations.transformers.config import NF4Config
from nf4.integrations.transformers.host import settle
from nf4.integrations.transformers.quantizer import NF4Quantizer
from nf4.integrations.wrapping import wrap_once
from nf4.layers.sharded import company_of
from nf4.models.adapt import adapter_names
from nf4.tools.ranks import gathered


def install() -> None:
    """Let ``save_pretrained`` of every transformers model know this package's layers; once."""
    wrap_once(PreTrainedModel, "save_pretrained", _saving)


def _saving(shipped: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' method, and adapters and a card around it."""
    signature = inspect.signature(shipped)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        settle(self)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        adapted = bool(adapted_layers(self))
        state, writes = given["state_dict"], given["is_main_process"]
        quantized = isinstance(getattr(self, "hf_quantizer", None), NF4Quantizer)
        if state is None and quantized and company_of(self):
            state = gathered(self.state_dict(), keep=writes)
        files = _files_of(self, state) if adapted and (writes or state is None) else {}
        if adapted and given["push_to_hub"]:
            raise ValueError(
                "push_to_hub: expected False for a model with nf4's adapters, got True; save the "
                "folder, and upload it with `hf upload REPOSITORY FOLDER`"
            )
        with config_of_its_own(self), ignoring_adapters(self), saving_state(self, state):
            result = shipped(self, *args, **kwargs)
        if writes:
            _write(files, Path(given["save_directory"]))
            alone = getattr(self, "_hf_peft_config_loaded", False)  # PEFT's adapter, and no base
            if quantized and not alone and not given["push_to_hub"]:
                form = self.hf_quantizer.quantization_config.to_dict()
                add_card(Path(given["save_directory"]), form)
        return result

    return save_pretrained


def _files_of(model: nn.Module, state: dict[str, Any] | None) -> dict[str, AdapterFiles]:
    """Return what is to be written of a model's adapters, by folder; "" is the model's own."""
    active = sorted({name for layer in adapted_layers(model) for name in layer.active_adapters})
    if len(active) > 1:
        raise ValueError(
            f"save_pretrained: expected at most one active adapter, got {', '.join(active)}; "
            "choose one by nf4.set_adapter, or save each by nf4.save_adapter"
        )
    return {
        "" if name in active else name: adapter_files(model, name, True, state)
        for name in adapter_names(model)
    }


def _write(files: dict[str, AdapterFiles], folder: Path) -> None:
    for name, adapter in files.items():
        (folder / name).mkdir(exist_ok=True)
        adapter.write(folder / name)


@contextmanager
def config_of_its_own(model: Any) -> Iterator[None]:
    """Let a dense model be saved as one though it shares its config with one that was quantized."""
    said = getattr(model.config, "quantization_config", None)
    if not isinstance(said, NF4Config) or hasattr(model, "hf_quantizer"):
        yield
        return
    del model.config.quantization_config
    try:
        yield
    finally:
        model.config.quantization_config = said


@contextmanager
def saving_state(model: Any, state: dict[str, Any] | None) -> Iterator[None]:
    """Let a model's quantizer write a state dict that was given, in place of the model's own."""
    quantizer = getattr(model, "hf_quantizer", None)
    if state is None or not isinstance(quantizer, NF4Quantizer):
        yield
        return
    quantizer.state_to_save = state
    vars(model)["gather_sharded_state_dict_for_save"] = _gathered  # transformers would do it again
    try:
        yield
    finally:
        quantizer.state_to_save = None
        del vars(model)["gather_sharded_state_dict_for_save"]


def _gathered(model: Any, state: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
    """Return a state dict that is gathered already."""
    return state


@contextmanager
def ignoring_adapters(model: Any) -> Iterator[None]:
    """Let transformers leave adapters out of a model's state dict within a ``with`` block."""
    if not adapted_layers(model):
        yield
        return
    inside = tuple(
        f"{name}.adapters." if name else "adapters."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AdaptedLayer)
    )
    names = [name for name in model.state_dict(keep_vars=True) if name.startswith(inside)]
    before = vars(model).get("_keys_to_ignore_on_save", _NOTHING)
    model._keys_to_ignore_on_save = [*(model._keys_to_ignore_on_save or ()), *names]
    try:
        yield
    finally:
        if before is _NOTHING:
            del model._keys_to_ignore_on_save
        else:
            model._keys_to_ignore_on_save = before


_NOTHING = object()


def restoring(load: Callable[..., Any], folder_of: Callable[..., str]) -> Callable[..., Any]:
    """Return a method of the Trainer that loads a checkpoint, and reads our adapters too.

    Args:
        load: the method.
        folder_of: returns the checkpoint's folder, of the method's arguments.
    """

    def loading(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model") or (args[1] if len(args) > 1 else None) or trainer.model
        folder = Path(folder_of(trainer, *args, **kwargs))
        if not adapted_layers(model) or not (folder / CONFIG_NAME).is_file():
            return load(trainer, *args, **kwargs)
        with ignoring_adapters(model):
            result = load(trainer, *args, **kwargs)
        for name in adapter_names(model):
            own = folder / name
            restore_adapter(model, own if (own / CONFIG_NAME).is_file() else folder, name)
        return result

    return loading
