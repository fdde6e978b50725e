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

from collections.abc import Callable, Iterator, Mapping

import peft.tuners.tuners_utils as peft_utils
from peft import PeftModel
from torch import Tensor, nn

from nf4.integrations.peft.experts import ParamWrapper
from nf4.integrations.peft.ia3 import NF4IA3Linear
from nf4.integrations.peft.install import install
from nf4.integrations.peft.lora import NF4LoraLinear
from nf4.layers.experts import expert_name
from nf4.layers.linear import LinearNF4
from nf4.models.merge import MergeError, requantized
from nf4.models.starts import check_rank, dense_source

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
    layers: dict[str, NF4LoraLinear | ParamWrapper] = dict(_layers_of(model))
    layers |= {n: m for n, m in model.named_modules() if isinstance(m, ParamWrapper)}
    if not layers:
        raise ValueError("model: expected LoRA adapters on LinearNF4 layers, found none")
    for name, module in model.named_modules():
        if isinstance(module, peft_utils.BaseTunerLayer) and name not in layers:
            raise ValueError(
                f"{name}: expected adapters on LinearNF4 layers alone, got one on a "
                f"{type(module.get_base_layer()).__name__}"
            )
    exact = (found for name, layer in layers.items() for found in _exact_weights(name, layer))
    merged = []
    for name, base, weight in exact:
        if not weight.isfinite().all():
            raise ValueError(f"{name}: expected base plus adapter of finite values, got others")
        merged.append((base, requantized(name, weight, base.weight, report)))
    for base, q in merged:
        base._set_weight(q)
    unloaded: nn.Module = model.unload()
    return unloaded


def _exact_weights(
    name: str, layer: NF4LoraLinear | ParamWrapper
) -> Iterator[tuple[str, LinearNF4, Tensor]]:
    """Yield the layers in four bits that an adapter is on, and what they come to: float32."""
    if isinstance(layer, NF4LoraLinear):
        yield name, layer.base, layer.exact_merged_weight()
        return
    experts, part = layer.get_base_layer(), layer.parameter_name
    terms = layer.active_terms()
    for expert, base in enumerate(experts.layers(part)):
        own = f"{name}.{part}.{expert_name(expert)}"
        if not isinstance(base, LinearNF4):
            raise ValueError(f"{own}: expected one adapter on it, or one on all experts, got both")
        yield own, base, experts.exact_weight(part, expert, terms)


install()
