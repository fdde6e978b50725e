"""Let PEFT find quantized layers, and put this package's layers on them."""

import functools
from collections.abc import Iterable
from typing import Any

import peft.tuners.lora.model as peft_lora
import peft.tuners.tuners_utils as peft_utils
import peft.utils.transformers_weight_conversion as peft_conversion
from peft import IA3Config, LoraConfig, PeftModel, TaskType
from peft.tuners.ia3.model import IA3Model
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from nf4.adapters.layer import AdaptedLayer
from nf4.integrations.counting import uncounted
from nf4.integrations.peft import prompts
from nf4.integrations.peft.experts import ParamWrapper, parameters_of_experts
from nf4.integrations.peft.ia3 import NF4IA3Linear
from nf4.integrations.peft.lora import NF4LoraLinear
from nf4.integrations.peft.targets import convert, include_experts
from nf4.layers.experts import ExpertsNF4
from nf4.layers.linear import LinearNF4
from nf4.layers.module import QuantizedModule
from nf4.models.merge import make_dense

_OURS = (NF4LoraLinear, NF4IA3Linear, ParamWrapper)


def _base(target: Any) -> Any:
    """Return a layer without PEFT's layers around it."""
    return target.get_base_layer() if isinstance(target, peft_utils.BaseTunerLayer) else target


def _on_nf4(target: nn.Module) -> bool:
    target = _base(target)
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


def install() -> None:
    """Let PEFT find quantized layers, and put `NF4LoraLinear` on them."""
    default, all_linear = peft_lora.dispatch_default, peft_utils._maybe_include_all_linear_layers
    if hasattr(default, "knows_nf4"):
        return

    @functools.wraps(default)
    def dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> Any:
        if _on_nf4(target):
            return NF4LoraLinear(target, adapter_name, config=config, **options)
        if options.get("parameter_name") is not None and isinstance(_base(target), ExpertsNF4):
            return ParamWrapper(target, adapter_name, config=config, **options)
        return default(target, adapter_name, config=config, **options)

    @functools.wraps(all_linear)
    def include(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        found = all_linear(peft_config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            left = {id(head) for head in _heads(model, peft_config)}
            left |= include_experts(peft_config, model)
            modules = model.named_modules()
            names = {n for n, m in modules if isinstance(m, LinearNF4) and id(m) not in left}
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

    shipped_unload = peft_utils.BaseTuner._unload_and_optionally_merge

    @functools.wraps(shipped_unload)
    def unload(self: Any, merge: bool = True, *args: Any, **options: Any) -> nn.Module:
        ours = any(isinstance(m, _OURS) for m in self.model.modules())
        model: nn.Module = shipped_unload(self, merge, *args, **options)
        return make_dense(model) if merge and ours else model

    shipped_inject = peft_utils.BaseTuner._inject_parameters

    @functools.wraps(shipped_inject)
    def inject(self: Any, peft_config: Any, model: nn.Module, **options: Any) -> list[str]:
        with parameters_of_experts(model):
            names: list[str] = shipped_inject(self, peft_config, model, **options)
        return names

    shipped_count = PeftModel.get_nb_trainable_parameters

    @functools.wraps(shipped_count)
    def count(self: Any) -> tuple[int, int]:
        trainable, every = shipped_count(self)
        return trainable, every + uncounted(self)

    PeftModel.get_nb_trainable_parameters = count
    prompts.install()
    peft_utils.BaseTuner._inject_parameters = inject
    peft_utils.BaseTuner._unload_and_optionally_merge = unload
    update_saved, ModulesToSaveWrapper.update = ModulesToSaveWrapper.update, update
    replace_ia3 = IA3Model._replace_module
    IA3Model._create_new_module = staticmethod(create)
    IA3Model._replace_module = replace
    dispatch.knows_nf4 = True  # type: ignore[attr-defined]
    peft_lora.dispatch_default = dispatch
    peft_utils._maybe_include_all_linear_layers = include
    peft_conversion._maybe_include_all_linear_layers = include
    shipped_convert = peft_conversion.convert_peft_config_for_transformers
    peft_conversion.convert_peft_config_for_transformers = functools.partial(
        convert, shipped_convert
    )
