"""What transformers calls while it loads, saves and dequantizes a model."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from nf4.integrations.transformers.config import METHOD, NF4Config
from nf4.integrations.transformers.empty import layers_in_files, make_empty
from nf4.integrations.transformers.operations import (
    BITSANDBYTES,
    FromBitsandbytes,
    NumberedExperts,
    Quantize,
)
from nf4.integrations.transformers.parallel import check_distributed
from nf4.integrations.transformers.stored import (
    Stored,
    check_stored,
    ignore_marks,
    names_in_model,
    stored_tensors,
)
from nf4.integrations.transformers.ties import tie_now, tied_parts, tied_to_embeddings
from nf4.integrations.transformers.zero import refuse_zero3
from nf4.layers.experts import PARTS as EXPERT_PARTS
from nf4.layers.experts import ExpertsNF4
from nf4.layers.linear import LinearNF4
from nf4.layers.module import QuantizedModule, name_weights
from nf4.models.merge import merge
from nf4.models.quantize import tie_parts
from nf4.models.selection import dense_layers, dense_weights, resolve_skip, select_layers
from nf4.tensor import PARTS, NF4Tensor, mark

# transformers asks this of a weight before it draws one; some models name a layer's from outside
NF4Tensor._is_hf_initialized = True  # type: ignore[attr-defined]


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
        self.state_to_save: dict[str, Any] | None = None  # which need not be the model's own
        self.adapted = False  # whether the model has adapters of nf4's
        self.dense_conversions: list[Any] | None = None  # of the model without 4-bit layers

    def refuse(self, name: str, error: Exception) -> None:
        """Keep an error, with the tensor's name and file, until all is loaded."""
        message = str(error)
        message = message if name in message else f"{name}: {message}"
        if name in self.stored:
            message = f"{self.stored[name].file}: {message}"
        self.errors.append(message)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot be done, before anything is loaded."""
        refuse_zero3("quantization_config")
        if not self.pre_quantized and self.quantization_config.stored_as != METHOD:
            raise ValueError(
                "stored_as: expected 'nf4' for a dense model, got 'bitsandbytes', which says what "
                "wrote a checkpoint; save the model, and write its files as bitsandbytes' by "
                "nf4.export_checkpoint or `nf4 export --format bitsandbytes SOURCE TARGET`"
            )
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
        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        """Return what reads the tensors of bitsandbytes, and experts that are called by number."""
        if self._reads_bitsandbytes:
            return [WeightConverter(BITSANDBYTES, "weight", [FromBitsandbytes(self)])]
        return [NumberedExperts(part) for part in EXPERT_PARTS] if self.pre_quantized else []

    @property
    def _reads_bitsandbytes(self) -> bool:
        return self.pre_quantized and self.quantization_config.stored_as == "bitsandbytes"

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        check_distributed(model, self.pre_quantized, config.stored_as)
        self.stored = stored_tensors(checkpoint_files)
        ignore_marks(self.stored, model)
        default = self._default_skip(model)
        skip = resolve_skip(config.skip_modules, default)
        config.skip_modules = skip if isinstance(skip, str) else list(skip)
        if config.quantize_embeddings:
            self.tied = tie_now(model, config)
        if self.pre_quantized and not self._reads_bitsandbytes and self.stored:
            self._make_stored(model)
            return
        if self.pre_quantized:
            layers = dense_layers(model, skip, config.quantize_embeddings)
        else:
            layers, _ = select_layers(model, skip, config.quantize_embeddings, default)
        self.weights = frozenset(
            f"{name}.{part}" for name, layer in layers.items() for part, _ in dense_weights(layer)
        )
        if self.pre_quantized and not self._reads_bitsandbytes:
            make_empty(model, layers, config, self.tied)

    def _make_stored(self, model: Any) -> None:
        """Quantize, without values, the layers of which the files hold 4-bit weights."""
        self.stored = names_in_model(self.stored, model)
        layers = layers_in_files(model, self.stored, self.quantization_config, self.tied)
        self.tied = {name: source for name, source in self.tied.items() if name in layers}
        make_empty(model, layers, self.quantization_config, self.tied)
        for module in model.modules():
            if isinstance(module, QuantizedModule):
                module.awaits = True
        check_stored(self.stored, model, model.all_tied_weights_keys)

    def _default_skip(self, model: Any) -> list[str]:
        """Return what transformers leaves dense, but for what is tied to embeddings in 4 bits."""
        fp32 = getattr(model, "_keep_in_fp32_modules", None)
        found = self.get_modules_to_not_convert(model, None, fp32)
        skip = {name.removesuffix(".bias") for name in found}
        if self.quantization_config.quantize_embeddings:
            pairs = tied_to_embeddings(model, self.quantization_config)
            tied = [name for pair in pairs for name in pair]
            skip = {name for name in skip if not any(t.startswith(f"{name}.") for t in tied)}
        return sorted(skip)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.errors:
            raise ValueError("; ".join(self.errors))
        for name, module in model.named_modules():
            if isinstance(module, QuantizedModule):
                self._check_scales(name, module)
                if module.split is not None:
                    module.split.settle(module)
                module.awaits = False
                for parameter in module.weight.tensors():
                    parameter.requires_grad_(False)
                module._choose_layout()
        tie_parts(model, self.tied)
        name_weights(model)
        self.keep_conversions(model, getattr(model, "_weight_conversions", None) or [])
        if self._reads_bitsandbytes:
            self.quantization_config.stored_as = METHOD
        describe(self.quantization_config, model)
        return model

    def keep_conversions(self, model: Any, conversions: list[Any]) -> None:
        """Let what was done to a checkpoint's tensors be undone on saving, but for those in 4 bits.

        Args:
            model: with 4-bit layers.
            conversions: as they are without.
        """
        self.dense_conversions = [c for c in conversions if not _is_ours(c)]
        model._weight_conversions = [c for c in self.dense_conversions if not _merges_experts(c)]

    def _check_scales(self, name: str, module: QuantizedModule) -> None:
        """Raise ValueError if a scale that was read is not finite; codes cannot be wrong."""
        for part, tensor in zip(PARTS, module.weight.parts(), strict=True):
            if tensor is None or not tensor.is_floating_point() or tensor.isfinite().all():
                continue
            key = f"{name}.{part}"
            where = f"{self.stored[key].file}: " if key in self.stored else ""
            raise ValueError(f"{where}{key}: expected finite values, got NaN or an infinity")

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        model = merge(model)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model if dtype is None else model.to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what `save_pretrained` writes: with a mark that only nf4 passes over."""
        given = self.state_to_save
        state: dict[str, Any] = model.state_dict() if given is None else dict(given)
        tied = {id(m) for n, m in model.named_modules() if f"{n}.packed" in tied_parts(model)}
        linear = (n for n, m in model.named_modules() if type(m) is LinearNF4 and id(m) not in tied)
        inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, ExpertsNF4))
        first = next((name for name in linear if name and not name.startswith(inside)), None)
        if first is not None:
            state[f"{first}.weight"] = mark()
        return state, {}

    def is_serializable(self, **kwargs: Any) -> bool:
        """Return True: `save_pretrained` writes what `from_pretrained` opens."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the Trainer may train the model without PEFT: it has adapters of nf4's."""
        return self.adapted

    @property
    def is_trainable(self) -> bool:
        """Return True: adapters can be trained on it.

        Raises:
            ValueError: ZeRO-3 was chosen after the model had been loaded; the Trainer asks first.
        """
        refuse_zero3("model")
        return True

    @property
    def is_compileable(self) -> bool:
        """Return True: there are no graph breaks."""
        return True


def describe(config: NF4Config, model: nn.Module) -> None:
    """Let a config say how a model's layers are quantized: most of them, and by name the others."""
    held = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    forms = Counter((m.block_size, m.double_quant) for m in held.values())
    config.block_size, config.double_quant = usual = forms.most_common(1)[0][0]
    found = {n: (m.block_size, m.double_quant) for n, m in held.items()}
    config.forms = {n: list(form) for n, form in found.items() if form != usual} or None


def _is_ours(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    ours = any(isinstance(op, FromBitsandbytes) for op in operations)
    return ours or isinstance(conversion, NumberedExperts)


def _merges_experts(conversion: Any) -> bool:
    targets = "\n".join(conversion.target_patterns)
    return isinstance(conversion, WeightConverter) and any(part in targets for part in EXPERT_PARTS)
