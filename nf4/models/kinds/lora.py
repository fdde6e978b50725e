"""LoRA on whole models: plain, rank-stabilized, DoRA; started by PiSSA or LoftQ."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from nf4.adapters.layer import AdaptedLayer, BaseChange
from nf4.adapters.lora import LoRA, check_lora_options, lora_scaling
from nf4.adapters.term import base_of
from nf4.layers.linear import LinearNF4
from nf4.models.adapt import (
    check_bias,
    check_parts,
    find_targets,
    layer_base,
    put_adapters,
    train_biases,
    with_adapter,
)
from nf4.models.quantize import Model
from nf4.models.starts import INITIALIZATIONS, check_rank, dense_source, initialize
from nf4.tensor import NF4Tensor


def add_lora(
    model: Model,
    r: int = 16,
    lora_alpha: float = 32,
    target_modules: str | Iterable[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    *,
    use_dora: bool = False,
    adapter_name: str = "default",
    init_lora_weights: bool | str = True,
    original: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    bias: str = "none",
) -> Model:
    """Add a trainable low-rank adapter to linear layers, and freeze everything else.

    A layer may have several adapters, by name; the one added last is active, see `set_adapter`.

    Args:
        model: a module with linear layers, `LinearNF4` or dense; changed in place.
        r: rank of the adapters, at least 1.
        lora_alpha: numerator of the scaling.
        target_modules: as in PEFT: ``"all-linear"`` for every `LinearNF4`, or, in a model without
            one, for every linear layer but the output layer; another string is a regular
            expression for the whole name; a list holds whole names or their last parts.
        lora_dropout: probability of dropping an input of the adapter in training, in [0, 1).
        use_rslora: scale by lora_alpha / sqrt(r) instead of lora_alpha / r.
        use_dora: learn the length of each row of the weight too
            (https://arxiv.org/abs/2402.09353).
        adapter_name: by which the adapter is chosen.
        init_lora_weights: True for PEFT's start, at which the adapter adds nothing. ``"pissa"``
            takes the largest singular vectors of the weight, and quantizes what is left as the new
            base (https://arxiv.org/abs/2404.02948); its files fit that base alone. ``"loftq"``
            takes those of what quantization lost (https://arxiv.org/abs/2310.08659, one
            alternation: the base stays); it needs original.
        original: the weights before quantization: the dense model, its state dict, or a folder of
            safetensors. PiSSA takes the dequantized ones without it.
        bias: which biases train too, and are saved with the adapter: "none", "lora_only" for those
            of layers with an adapter, or "all". Only for a model's only adapter.

    Returns:
        The model; a new layer if the model itself is the layer.

    Raises:
        TypeError: model is no module, an option has the wrong type, a target is no linear layer,
            or a start is wanted on a dense one.
        ValueError: no module matches target_modules, a target has an adapter of that name already,
            an option is out of range, or a weight of original is missing or has another shape.
    """
    check_lora_options(r, lora_alpha, lora_dropout, use_rslora, use_dora)
    check_bias(bias)
    kind = "" if init_lora_weights is True else init_lora_weights
    if kind not in ("", *INITIALIZATIONS):
        raise ValueError(
            f"init_lora_weights: expected True or one of {', '.join(INITIALIZATIONS)}, "
            f"got {init_lora_weights!r}"
        )
    targets = find_targets(model, target_modules, adapter_name, LoRA, bias)
    for name, layer in targets.items():
        if isinstance(layer, LinearNF4):
            check_parts(name, layer, not use_dora)
            if kind:
                layer.check_whole(f"start by {kind}")
    quantized = _check_start(str(kind), targets, r)
    source = dense_source(original, quantized, needed=kind == "loftq") if kind else None
    options: dict[str, Any] = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "use_dora": use_dora,
    }

    def make(name: str, layer: nn.Module) -> nn.Module:
        base = layer_base(layer)
        if not isinstance(base.weight, NF4Tensor) or not kind:
            return with_adapter(layer, adapter_name, LoRA(base, **options))
        dense = None if source is None else source(name)
        scaling = lora_scaling(r, lora_alpha, use_rslora)
        start = initialize(str(kind), base.weight, dense, r, scaling)
        if kind == "pissa":
            layer = LinearNF4.from_weight(start.q, base.bias).take_after(layer)
        adapter = LoRA(base_of(start.q), **options)
        adapter.start_from(base_of(start.q), start.lora_A, start.lora_B)
        new = with_adapter(layer, adapter_name, adapter)
        if kind == "pissa":
            new.base_change = BaseChange(str(kind), r, original is not None, adapter_name)
        return new

    model = put_adapters(model, targets, make, adapter_name)
    train_biases(model, bias)
    return model


def _check_start(kind: str, targets: Mapping[str, nn.Module], r: int) -> dict[str, LinearNF4]:
    """Return the layers to start from their weight: all targets, if there is a start to make.

    Raises:
        TypeError: a layer is dense.
        ValueError: a layer cannot start so.
    """
    quantized = {}
    for name, layer in targets.items() if kind else ():
        if not isinstance(layer, LinearNF4):
            raise TypeError(f"{name}: expected a LinearNF4 for {kind}, got {type(layer).__name__}")
        if kind == "pissa" and isinstance(layer, AdaptedLayer):
            raise ValueError(
                f"{name}: expected a layer without adapter for pissa, which changes the base"
            )
        check_rank(r, layer.weight, kind)
        quantized[name] = layer
    return quantized
