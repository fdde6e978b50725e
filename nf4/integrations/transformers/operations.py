"""What makes quantized layers of tensors that transformers has read."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, Self

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightRenaming

from nf4.functional import quantize
from nf4.integrations.transformers.config import NF4Config
from nf4.layers.bitsandbytes import take
from nf4.layers.experts import PARTS as EXPERT_PARTS
from nf4.layers.experts import ExpertsNF4, is_experts
from nf4.layers.linear import LinearNF4, is_conv1d
from nf4.layers.module import QuantizedModule
from nf4.models.quantize import quantized_layer, replace_layers
from nf4.models.selection import dense_weights
from nf4.tensor import NF4Tensor

# Of a weight that bitsandbytes wrote; the longer names first, for they are tried in order
BITSANDBYTES = [
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight",
]


class NumberedExperts(WeightRenaming):  # type: ignore[misc]
    """Give experts their names in files that call them by their number.

    Args:
        part: one of the two weights of experts.
    """

    def __init__(self, part: str) -> None:
        super().__init__(rf"\.{part}\.(\d+)\.", rf".{part}.expert_\1.")


class Loading(Protocol):
    """What the quantizer knows while a model loads."""

    quantization_config: NF4Config
    weights: frozenset[str]
    waiting: dict[str, dict[str, list[NF4Tensor]]]

    def refuse(self, name: str, error: Exception) -> None:
        """Keep an error, with the tensor's name and file, until all is loaded."""


class Operation(ConversionOps):  # type: ignore[misc]
    """What makes a `LinearNF4` of the tensors that have just been read of a layer.

    An error is kept until all is loaded, to be raised with the tensor's name; transformers, which
    goes on after one, would only say that there was one.
    """

    def __init__(self, hf_quantizer: Loading) -> None:
        self.hf_quantizer = hf_quantizer  # transformers asks for it: tensors are not cast then

    def __deepcopy__(self, memo: Any) -> Self:
        """Return one for the same quantizer: transformers copies what it converts by."""
        return type(self)(self.hf_quantizer)

    def put(
        self, model: nn.Module, name: str, make: Callable[[], NF4Tensor], missing_keys: set[str]
    ) -> None:
        """Replace the layer whose dense weight has a name by one around a quantized weight.

        So is every layer that is tied to it.
        """
        old: Any = model.get_submodule(name.rpartition(".")[0])
        if isinstance(old, QuantizedModule):
            missing_keys.discard(name)
            return  # by its other name; the file has both
        ((_, dense),) = dense_weights(old)
        layers = {
            n: m
            for n, m in model.named_modules(remove_duplicate=False)
            if m is old or f"{n}.weight" in self.hf_quantizer.weights and m.weight is old.weight
        }
        for alias in layers:
            missing_keys.discard(f"{alias}.weight")
        shape, dtype = tuple(dense.shape), dense.dtype
        try:
            q = make()
            if tuple(q.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(q.shape)}")
        except (TypeError, ValueError) as error:
            self.hf_quantizer.refuse(name, error)
            return

        def convert(old: nn.Module) -> nn.Module:
            nonlocal q
            layer: Any = quantized_layer(old, replace(q, dtype=dtype))
            layer._is_hf_initialized = True
            q = layer.weight  # what is tied shares its parameters
            return layer  # type: ignore[no-any-return]

        replace_layers(model, layers, convert)


class Quantize(Operation):
    """Quantize a dense weight."""

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, missing_keys: set[str], **_: Any
    ) -> dict[str, Tensor]:
        """Quantize what has been read; nothing is left for transformers to set."""
        config = self.hf_quantizer.quantization_config
        make = partial(
            quantize,
            block_size=config.block_size,
            double_quant=config.double_quant,
            scale=config.scale,
            check=True,
        )
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer = model.get_submodule(name.rpartition(".")[0])
            if is_experts(layer):
                self._put_experts(model, name, layer, weight, make, missing_keys)
                continue
            weight = weight.T if is_conv1d(layer) else weight
            self.put(model, name, partial(make, weight), missing_keys)
        return {}

    def _put_experts(
        self,
        model: nn.Module,
        name: str,
        old: nn.Module,
        weight: Tensor,
        make: Callable[[Tensor], NF4Tensor],
        missing_keys: set[str],
    ) -> None:
        """Quantize one weight of all experts; replace them once both are here."""
        module, _, part = name.rpartition(".")
        missing_keys.discard(name)
        waiting = self.hf_quantizer.waiting.setdefault(module, {})
        try:
            waiting[part] = [make(w) for w in weight]
        except ValueError as error:
            self.hf_quantizer.refuse(name, error)
        if len(waiting) == len(EXPERT_PARTS):
            del self.hf_quantizer.waiting[module]
            found = iter([q for part in EXPERT_PARTS for q in waiting[part]])
            experts = ExpertsNF4(old, lambda *_: LinearNF4.from_weight(next(found)))
            for one in experts.modules():
                one._is_hf_initialized = True  # type: ignore[assignment]
            replace_layers(model, {module: old}, lambda old: experts)


class FromBitsandbytes(Operation):
    """Take the tensors of a weight that bitsandbytes wrote."""

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str],
        **_: Any,
    ) -> dict[str, Tensor]:
        """Take what has been read of one weight, or pass on what is none of bitsandbytes'."""
        if len(input_dict) == 1:  # the weight of a norm, or of a layer that was skipped
            (weight,) = input_dict.values()
            old = model.get_parameter(full_layer_name)
            weight = weight[0] if isinstance(weight, list) else weight
            return {"weight": weight.to(old.dtype)}
        module = full_layer_name.rpartition(".")[0]
        tensors = {
            f"{module}.{key}": value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
        self.put(model, full_layer_name, partial(take, tensors, full_layer_name), missing_keys)
        return {}
