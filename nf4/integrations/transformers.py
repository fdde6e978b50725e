"""Quantize transformers' models while they load, save them, and open them again.

    import nf4.integrations.transformers as nf4_hf
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=nf4_hf.NF4Config())
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

Importing this module makes the method "nf4" known to transformers, which must have happened before
such a folder is opened. Weights are quantized one by one as they arrive, on the device that they
are meant for: memory holds the 4-bit model and a tensor. transformers 5.17 and newer.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from nf4.bitsandbytes_files import take
from nf4.checks import check_block_size, check_scale
from nf4.convert import (
    check_skip_modules,
    dense_layers,
    dense_weights,
    quantized_layer,
    quantized_layers,
    replace_layers,
    tie_parts,
    token_embeddings,
)
from nf4.experts import PARTS as EXPERT_PARTS
from nf4.experts import ExpertsNF4, is_experts
from nf4.functional import quantize
from nf4.integrations._stored import (
    Stored,
    check_stored,
    is_part,
    names_in_model,
    stored_tensors,
)
from nf4.linear import LinearNF4, is_conv1d
from nf4.merging import merge
from nf4.quantized_module import QuantizedModule
from nf4.tensor import PARTS, NF4Tensor

METHOD = "nf4"
_OPTIONS_OF_OTHERS = ("bnb_", "load_in_", "llm_int8_")
# transformers asks this of a weight before it draws one; some models name a layer's from outside
NF4Tensor._is_hf_initialized = True  # type: ignore[attr-defined]
# Of a weight that bitsandbytes wrote; the longer names first, for they are tried in order
_BITSANDBYTES = [
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight",
]


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained` quantizes a model.

    Args:
        block_size: elements that share one scale, a power of two from 32 to 4096.
        double_quant: quantize the scales to 8 bits too.
        skip_modules: modules to leave dense, as in `nf4.quantize_model`. By default what
            transformers leaves alone: the output layer, and what is tied to the embeddings.
        stored_as: what wrote the weights, of a checkpoint that is quantized: "nf4" or
            "bitsandbytes".
        quantize_embeddings: quantize the embeddings of tokens too, and with them an output layer
            that is tied to them.
        codebook: "nf4", the only one; a checkpoint says so.
        scale: how scales are found, see `nf4.quantize`.
        **ignored: what newer versions add.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: block_size is not supported, or stored_as, codebook or scale another word.
    """

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        skip_modules: list[str] | str | None = None,
        stored_as: str = METHOD,
        quantize_embeddings: bool = False,
        codebook: str = "nf4",
        scale: str = "absmax",
        **ignored: Any,
    ) -> None:
        for name, value in (
            ("double_quant", double_quant),
            ("quantize_embeddings", quantize_embeddings),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        if stored_as not in (METHOD, "bitsandbytes"):
            raise ValueError(f"stored_as: expected 'nf4' or 'bitsandbytes', got {stored_as!r}")
        if codebook != "nf4":
            raise ValueError(f"codebook: expected 'nf4', got {codebook!r}")
        if skip_modules is not None:
            found = check_skip_modules(skip_modules)
            skip_modules = found if isinstance(found, str) else list(found)
        other = [name for name in ignored if name.startswith(_OPTIONS_OF_OTHERS)]
        if other:
            raise ValueError(
                f"{other[0]}: expected options of nf4, got one of bitsandbytes; see "
                "NF4Config.from_bitsandbytes"
            )
        self.quant_method = METHOD
        self.block_size = check_block_size(block_size)
        self.double_quant = double_quant
        self.skip_modules = skip_modules
        self.stored_as = stored_as
        self.quantize_embeddings = quantize_embeddings
        self.codebook, self.scale = codebook, check_scale(scale)

    @classmethod
    def from_bitsandbytes(cls, config: BitsAndBytesConfig | dict[str, Any]) -> "NF4Config":
        """Return the config that opens a checkpoint of bitsandbytes as nf4's.

        Args:
            config: that of the checkpoint: ``AutoConfig.from_pretrained(path)`` has it as
                ``quantization_config``; put the result's ``to_dict()`` in its place and pass the
                whole as ``config`` to ``from_pretrained``.

        Raises:
            TypeError: config is none of bitsandbytes.
            ValueError: the checkpoint is not NF4.
        """
        if isinstance(config, dict):
            if not config.get("load_in_4bit"):
                raise ValueError(f"config: expected one with load_in_4bit, got {config}")
            config = BitsAndBytesConfig.from_dict(config)
        if not isinstance(config, BitsAndBytesConfig):
            raise TypeError(f"config: expected a BitsAndBytesConfig, got {type(config).__name__}")
        if not config.load_in_4bit or config.bnb_4bit_quant_type != "nf4":
            raise ValueError(
                "config: expected load_in_4bit with bnb_4bit_quant_type 'nf4', got "
                f"{config.bnb_4bit_quant_type!r} with load_in_4bit={config.load_in_4bit}"
            )
        return cls(
            double_quant=config.bnb_4bit_use_double_quant,
            skip_modules=config.llm_int8_skip_modules,
            stored_as="bitsandbytes",
        )


class _Operation(ConversionOps):  # type: ignore[misc]
    """What makes a `LinearNF4` of the tensors that have just been read of a layer.

    An error is kept until all is loaded, to be raised with the tensor's name; transformers, which
    goes on after one, would only say that there was one.
    """

    def __init__(self, hf_quantizer: "NF4Quantizer") -> None:
        self.hf_quantizer = hf_quantizer  # transformers asks for it: tensors are not cast then

    def __deepcopy__(self, memo: Any) -> Self:
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


class _Quantize(_Operation):
    """Quantize a dense weight."""

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, missing_keys: set[str], **_: Any
    ) -> dict[str, Tensor]:
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
            experts = ExpertsNF4(old, lambda w: LinearNF4.from_weight(next(found)))
            for one in experts.modules():
                one._is_hf_initialized = True  # type: ignore[assignment]
            replace_layers(model, {module: old}, lambda old: experts)


class _FromBitsandbytes(_Operation):
    """Take the tensors of a weight that bitsandbytes wrote."""

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str],
        **_: Any,
    ) -> dict[str, Tensor]:
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


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads a model; users have no need of it."""

    requires_calibration = False
    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **options: Any) -> None:
        # A copy, for what is found out of one model is not said of another
        super().__init__(copy.copy(quantization_config), **options)
        self.weights: frozenset[str] = frozenset()  # names, of those to be quantized
        self.errors: list[str] = []
        self.stored: dict[str, Stored] = {}  # what the checkpoint's files hold, by name
        self.tied: dict[str, str] = {}  # layers that share their weight with embeddings, by name
        self.waiting: dict[str, dict[str, list[NF4Tensor]]] = {}  # experts of which half is there

    def refuse(self, name: str, error: Exception) -> None:
        """Keep an error, with the tensor's name and file, until all is loaded."""
        message = str(error)
        message = message if name in message else f"{name}: {message}"
        if name in self.stored:
            message = f"{self.stored[name].file}: {message}"
        self.errors.append(message)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to leave quantized layers on the disk."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                f"device_map: expected devices for the 4-bit weights, got 'disk' in {device_map}"
            )

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Return the bytes an element will take."""
        if param_name not in self.weights:
            return float(param.element_size())
        config = self.quantization_config
        return 0.5 + (1 + 4 / 256 if config.double_quant else 4) / config.block_size

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is a dense weight that is to be quantized."""
        return not self.pre_quantized and param_name in self.weights

    def get_quantize_ops(self) -> ConversionOps:
        """Return what quantizes a weight."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return what reads the tensors of bitsandbytes."""
        if not self._reads_bitsandbytes:
            return []
        return [WeightConverter(_BITSANDBYTES, "weight", [_FromBitsandbytes(self)])]

    @property
    def _reads_bitsandbytes(self) -> bool:
        return self.pre_quantized and self.quantization_config.stored_as == "bitsandbytes"

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self.stored = stored_tensors(checkpoint_files)
        if config.skip_modules is None:
            config.skip_modules = self._default_skip(model)
        if config.quantize_embeddings:
            self._tie(model)
        if self.pre_quantized and not self._reads_bitsandbytes and self.stored:
            self._make_stored(model)
            return
        layers = dense_layers(model, config.skip_modules, config.quantize_embeddings)
        if not layers:
            raise ValueError(
                f"skip_modules: expected to leave a linear layer to quantize, "
                f"{config.skip_modules} leaves none in {type(model).__name__}"
            )
        self.weights = frozenset(
            f"{name}.{part}" for name, layer in layers.items() for part, _ in dense_weights(layer)
        )
        if self.pre_quantized and not self._reads_bitsandbytes:
            self._make_empty(model, layers)

    def _make_stored(self, model: Any) -> None:
        """Quantize, without values, the layers of which the files hold 4-bit weights.

        The files decide, not skip_modules, which was that of the model that was saved: another head
        may be on it now, which is dense and new.
        """
        self.stored = names_in_model(self.stored, model)
        layers = dense_layers(model, (), self.quantization_config.quantize_embeddings)
        stored = {name.rpartition(".")[0] for name in self.stored if is_part(name)}
        inside = {name.rpartition(".")[0].rpartition(".")[0] for name in stored}
        layers = {
            name: layer
            for name, layer in layers.items()
            if self.tied.get(name, name) in stored or (is_experts(layer) and name in inside)
        }
        self.tied = {name: source for name, source in self.tied.items() if name in layers}
        self._make_empty(model, layers)
        check_stored(self.stored, model, model.all_tied_weights_keys)

    def _make_empty(self, model: Any, layers: dict[str, nn.Module]) -> None:
        """Replace layers by quantized ones on meta, whose values are to be loaded."""
        config = self.quantization_config

        def empty(weight: Tensor) -> NF4Tensor:
            return quantize(weight, config.block_size, config.double_quant)

        def convert(old: nn.Module) -> nn.Module:
            if is_experts(old):
                return ExpertsNF4(old, lambda weight: LinearNF4.from_weight(empty(weight)))
            ((_, weight),) = dense_weights(old)
            return quantized_layer(old, empty(weight))

        replace_layers(model, layers, convert)
        tie_parts(model, self.tied)

    def _default_skip(self, model: Any) -> list[str]:
        """Return what transformers leaves dense, but for what is tied to embeddings in 4 bits."""
        fp32 = getattr(model, "_keep_in_fp32_modules", None)
        found = self.get_modules_to_not_convert(model, None, fp32)
        skip = {name.removesuffix(".bias") for name in found}
        if self.quantization_config.quantize_embeddings:
            tied = [name for pair in self._ties(model) for name in pair]
            skip = {name for name in skip if not any(t.startswith(f"{name}.") for t in tied)}
        return sorted(skip)

    @staticmethod
    def _ties(model: Any) -> list[tuple[str, str]]:
        """Return which weights, by name, are tied to those of embeddings of tokens."""
        embeddings = token_embeddings(model)
        return [
            (target, source)
            for target, source in model.all_tied_weights_keys.items()
            if id(model.get_submodule(source.rpartition(".")[0])) in embeddings
        ]

    def _tie(self, model: Any) -> None:
        """Tie weights to those of the embeddings now; transformers does when all is loaded."""
        for target, source in self._ties(model):
            module, _, name = target.rpartition(".")
            setattr(model.get_submodule(module), name, model.get_parameter(source))
            self.tied[module] = source.rpartition(".")[0]
            del model.all_tied_weights_keys[target]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.errors:
            raise ValueError("; ".join(self.errors))
        layers = quantized_layers(model).values()
        for name, module in model.named_modules():
            if isinstance(module, QuantizedModule):
                self._check_scales(name, module)
                for parameter in module.weight.tensors():
                    parameter.requires_grad_(False)
                module._choose_layout()
        tie_parts(model, self.tied)
        # What was done to the tensors of a checkpoint is undone when it is saved; not so where they
        # are quantized now
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not self._is_ours(c)]
        if self._reads_bitsandbytes:
            self._describe(layers)
        return model

    def _check_scales(self, name: str, module: QuantizedModule) -> None:
        """Raise ValueError if a scale that was read is not finite; codes cannot be wrong."""
        for part, tensor in zip(PARTS, module.weight.parts(), strict=True):
            if tensor is None or not tensor.is_floating_point() or tensor.isfinite().all():
                continue
            key = f"{name}.{part}"
            where = f"{self.stored[key].file}: " if key in self.stored else ""
            raise ValueError(f"{where}{key}: expected finite values, got NaN or an infinity")

    @staticmethod
    def _is_ours(conversion: Any) -> bool:
        if any(isinstance(op, _FromBitsandbytes) for op in getattr(conversion, "operations", ())):
            return True
        merges = isinstance(conversion, WeightConverter)
        targets = "\n".join(conversion.target_patterns)
        return merges and any(part in targets for part in EXPERT_PARTS)

    def _describe(self, layers: Any) -> None:
        """Let the config say how a checkpoint of bitsandbytes was quantized."""
        config = self.quantization_config
        forms = sorted({(layer.block_size, layer.double_quant) for layer in layers})
        if len(forms) != 1:
            raise ValueError(
                f"checkpoint: expected one block size and one kind of scales, got {forms}"
            )
        config.block_size, config.double_quant = forms[0]
        config.stored_as = METHOD

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        model = merge(model)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, **kwargs: Any) -> bool:
        """Return True: `save_pretrained` writes what `from_pretrained` opens."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters can be trained on it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Return True: there are no graph breaks."""
        return True
