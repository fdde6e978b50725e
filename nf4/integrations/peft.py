"""PEFT's LoRA and (IA)³ on quantized layers, LoRA computed by nf4's fused operator.

    import nf4.integrations.peft
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", ...))

Importing this module is all: from then on PEFT puts `NF4LoraLinear` on each `LinearNF4` that it
targets, in `get_peft_model`, `PeftModel.from_pretrained` and `add_adapter` alike. Adapters, their
files and all that PEFT does with them stay PEFT's. LoRA, rsLoRA, DoRA, PiSSA, LoftQ and (IA)³;
PEFT 0.21.
Sources: LoRA (https://arxiv.org/abs/2106.09685), rsLoRA (https://arxiv.org/abs/2312.03732),
DoRA (https://arxiv.org/abs/2402.09353), (IA)³ (https://arxiv.org/abs/2205.05638).
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import peft.tuners.lora.model as peft_lora
import peft.tuners.tuners_utils as peft_utils
from peft import IA3Config, LoraConfig, PeftModel, TaskType
from peft.tuners.ia3.model import IA3Model
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from nf4.adapted import AdaptedLayer
from nf4.initialize import check_rank, dense_source
from nf4.integrations._peft_ia3 import NF4IA3Linear
from nf4.integrations._peft_lora import NF4LoraLinear
from nf4.linear import LinearNF4
from nf4.merging import MergeError, requantized
from nf4.quantized_module import QuantizedModule

__all__ = [
    "NF4IA3Linear",
    "NF4LoraLinear",
    "merge_and_requantize",
    "replace_lora_weights_loftq",
]


def replace_lora_weights_loftq(
    model: PeftModel,
    original: nn.Module | Mapping[str, Tensor] | str,
    adapter_name: str = "default",
) -> None:
    """Start an adapter by LoftQ: from the singular vectors of what quantization lost.

    The 4-bit base stays as it is, so that the adapter fits any copy of it.

    Args:
        model: with LoRA adapters on `LinearNF4`; changed in place.
        original: the weights before quantization: the dense model, its state dict, or a folder of
            safetensors.
        adapter_name: of the adapter.

    Raises:
        TypeError: model is no PeftModel, or original of another kind.
        ValueError: no layer has that adapter, r is too large, or a weight is missing or another
            one than was quantized; nothing is changed then.

    Source: LoftQ (https://arxiv.org/abs/2310.08659).
    """
    layers = {n: m for n, m in _layers_of(model).items() if adapter_name in m.lora_A}
    if not layers:
        raise ValueError(f"adapter_name: expected that of an adapter, got {adapter_name!r}")
    names = {name: name.removeprefix("base_model.model.") for name in layers}
    bases = {names[name]: layer.base for name, layer in layers.items()}
    source = dense_source(original, bases, needed=True)
    assert source is not None
    for layer in layers.values():
        check_rank(layer.r[adapter_name], layer.base.weight, "loftq")
    for name, layer in layers.items():
        layer.start("loftq", adapter_name, source(names[name]))


def _layers_of(model: PeftModel) -> dict[str, NF4LoraLinear]:
    if not isinstance(model, PeftModel):
        raise TypeError(f"model: expected a PeftModel, got {type(model).__name__}")
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4LoraLinear)}


def merge_and_requantize(
    model: PeftModel, report: Callable[[MergeError], None] | None = None
) -> nn.Module:
    """Fold the active adapters into the 4-bit weights, and return the model without PEFT.

    ``model.merge_and_unload()`` gives dense layers instead, each rounded once.

    Args:
        model: with adapters on `LinearNF4`; used up.
        report: called with the `MergeError` of each layer: how much of the adapter the new
            rounding left.

    Raises:
        TypeError: model is no PeftModel.
        ValueError: no layer of it is quantized by nf4, or another layer has an adapter too, which
            would be lost: ``model.merge_and_unload()`` keeps it.
    """
    layers = _layers_of(model)
    if not layers:
        raise ValueError("model: expected LoRA adapters on LinearNF4 layers, found none")
    for name, module in model.named_modules():
        if isinstance(module, peft_utils.BaseTunerLayer) and name not in layers:
            raise ValueError(
                f"{name}: expected adapters on LinearNF4 layers alone, got one on a "
                f"{type(module.get_base_layer()).__name__}"
            )
    merged = {}
    for name, layer in layers.items():
        exact = layer.exact_merged_weight()
        if not exact.isfinite().all():
            raise ValueError(f"{name}: expected base plus adapter of finite values, got others")
        merged[name] = requantized(name, exact, layer.base.weight, report)
    for name, layer in layers.items():
        layer.base._set_weight(merged[name])
    unloaded: nn.Module = model.unload()
    return unloaded


def _on_nf4(target: nn.Module) -> bool:
    if isinstance(target, peft_utils.BaseTunerLayer):
        target = target.get_base_layer()
    if isinstance(target, AdaptedLayer):
        raise ValueError(
            f"expected a LinearNF4 without adapter, got a {type(target).__name__}: add adapters "
            "with nf4.add_lora or with PEFT, not with both"
        )
    return isinstance(target, LinearNF4)


def _heads(model: Any, config: Any) -> list[Any]:
    """Return what PEFT leaves out of "all-linear": the output layer, or a classifier."""
    get = getattr(model, "get_output_embeddings", None)
    heads = [None if get is None else get()]
    if config.task_type == TaskType.SEQ_CLS:
        heads += [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    return [head for head in heads if head is not None]


def _install() -> None:
    """Let PEFT find quantized layers, and put `NF4LoraLinear` on them."""
    default, all_linear = peft_lora.dispatch_default, peft_utils._maybe_include_all_linear_layers
    if hasattr(default, "knows_nf4"):
        return

    @functools.wraps(default)
    def dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> Any:
        if _on_nf4(target):
            return NF4LoraLinear(target, adapter_name, config=config, **options)
        return default(target, adapter_name, config=config, **options)

    @functools.wraps(all_linear)
    def include(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        found = all_linear(peft_config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            heads = {id(head) for head in _heads(model, peft_config)}
            modules = model.named_modules()
            names = {n for n, m in modules if isinstance(m, LinearNF4) and id(m) not in heads}
            others: Iterable[str] = found.target_modules
            found.target_modules = names | ({others} if isinstance(others, str) else set(others))
        return found

    create_ia3 = IA3Model._create_new_module

    def create(config: IA3Config, adapter_name: str, target: nn.Module, **options: Any) -> Any:
        if _on_nf4(target):
            return NF4IA3Linear(target, adapter_name, config, **options)
        return create_ia3(config, adapter_name, target, **options)

    def replace(self: Any, parent: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
        if isinstance(old, NF4IA3Linear) and not hasattr(new, "base_layer"):
            setattr(parent, name, new)  # PEFT would give it the weight of the quantized layer
        else:
            replace_ia3(self, parent, name, new, old)

    def update(self: Any, adapter_name: str, **options: Any) -> None:
        if isinstance(self.original_module, QuantizedModule):
            raise ValueError(
                "modules_to_save: expected modules that can be trained, got a "
                f"{type(self.original_module).__name__}; leave it dense by skip_modules"
            )
        update_saved(self, adapter_name, **options)

    update_saved, ModulesToSaveWrapper.update = ModulesToSaveWrapper.update, update
    replace_ia3 = IA3Model._replace_module
    IA3Model._create_new_module = staticmethod(create)
    IA3Model._replace_module = replace
    dispatch.knows_nf4 = True  # type: ignore[attr-defined]
    peft_lora.dispatch_default = dispatch
    peft_utils._maybe_include_all_linear_layers = include


_install()
