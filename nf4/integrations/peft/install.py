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
    if isinstance(target, LinearNF4) and target.split is not None:
        raise ValueError(
            f"expected a whole layer for PEFT's adapters, got one with {target.split}: use "
            "nf4.add_lora, which splits adapters to match"
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
    """Let PEFT find quantized layers, and put this package's layers on them."""
    if hasattr(peft_lora.dispatch_default, "knows_nf4"):
        return
    _count_weights()
    _unload_dense()
    _find_experts()
    _refuse_to_train_bytes()
    _put_ia3()
    _find_all_linear()
    _put_lora()
    prompts.install()


def _count_weights() -> None:
    """Let PEFT count weights, not bytes."""
    shipped = PeftModel.get_nb_trainable_parameters

    @functools.wraps(shipped)
    def count(self: Any) -> tuple[int, int]:
        trainable, every = shipped(self)
        return trainable, every + uncounted(self)

    PeftModel.get_nb_trainable_parameters = count


def _unload_dense() -> None:
    """Let merging leave no layer in four bits."""
    shipped = peft_utils.BaseTuner._unload_and_optionally_merge

    @functools.wraps(shipped)
    def unload(self: Any, merge: bool = True, *args: Any, **options: Any) -> nn.Module:
        ours = any(isinstance(m, _OURS) for m in self.model.modules())
        model: nn.Module = shipped(self, merge, *args, **options)
        return make_dense(model) if merge and ours else model

    peft_utils.BaseTuner._unload_and_optionally_merge = unload


def _find_experts() -> None:
    """Let ``target_parameters`` find the weights of experts."""
    shipped = peft_utils.BaseTuner._inject_parameters
    shipped_convert = peft_conversion.convert_peft_config_for_transformers

    @functools.wraps(shipped)
    def inject(self: Any, peft_config: Any, model: nn.Module, **options: Any) -> list[str]:
        with parameters_of_experts(model):
            names: list[str] = shipped(self, peft_config, model, **options)
        return names

    peft_utils.BaseTuner._inject_parameters = inject
    peft_conversion.convert_peft_config_for_transformers = functools.partial(
        convert, shipped_convert
    )


def _refuse_to_train_bytes() -> None:
    """Let ``modules_to_save`` refuse what cannot be trained."""
    shipped = ModulesToSaveWrapper.update

    @functools.wraps(shipped)
    def update(self: Any, adapter_name: str, **options: Any) -> None:
        if isinstance(self.original_module, QuantizedModule):
            raise ValueError(
                "modules_to_save: expected modules that can be trained, got a "
                f"{type(self.original_module).__name__}; leave it dense by skip_modules"
            )
        shipped(self, adapter_name, **options)

    ModulesToSaveWrapper.update = update


def _put_ia3() -> None:
    """Put `NF4IA3Linear` on quantized layers."""
    shipped_create, shipped_replace = IA3Model._create_new_module, IA3Model._replace_module

    @functools.wraps(shipped_create)
    def create(config: IA3Config, adapter_name: str, target: nn.Module, **options: Any) -> Any:
        if _on_nf4(target):
            return NF4IA3Linear(target, adapter_name, config, **options)
        return shipped_create(config, adapter_name, target, **options)

    @functools.wraps(shipped_replace)
    def replace(self: Any, parent: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
        if isinstance(old, NF4IA3Linear) and not hasattr(new, "base_layer"):
            setattr(parent, name, new)  # PEFT would give it the weight of the quantized layer
        else:
            shipped_replace(self, parent, name, new, old)

    IA3Model._create_new_module = staticmethod(create)
    IA3Model._replace_module = replace


def _find_all_linear() -> None:
    """Let "all-linear" mean quantized layers too."""
    shipped = peft_utils._maybe_include_all_linear_layers

    @functools.wraps(shipped)
    def include(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        found = shipped(peft_config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            left = {id(head) for head in _heads(model, peft_config)}
            left |= include_experts(peft_config, model)
            modules = model.named_modules()
            names = {n for n, m in modules if isinstance(m, LinearNF4) and id(m) not in left}
            others: Iterable[str] = found.target_modules
            found.target_modules = names | ({others} if isinstance(others, str) else set(others))
        return found

    peft_utils._maybe_include_all_linear_layers = include
    peft_conversion._maybe_include_all_linear_layers = include


def _put_lora() -> None:
    """Put `NF4LoraLinear` on quantized layers, and adapters on experts."""
    shipped = peft_lora.dispatch_default

    @functools.wraps(shipped)
    def dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, **options: Any) -> Any:
        if _on_nf4(target):
            return NF4LoraLinear(target, adapter_name, config=config, **options)
        if options.get("parameter_name") is not None and isinstance(_base(target), ExpertsNF4):
            return ParamWrapper(target, adapter_name, config=config, **options)
        return shipped(target, adapter_name, config=config, **options)

    dispatch.knows_nf4 = True  # type: ignore[attr-defined]
    peft_lora.dispatch_default = dispatch
