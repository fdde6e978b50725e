"""PEFT's LoRA on a `LinearNF4`: the layer that nf4.integrations.peft puts there."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import peft.tuners.tuners_utils as peft_utils
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import dropout

from nf4.adapters.lora import LoRATerm, weight_norm
from nf4.adapters.term import Base, Product, base_of, compute, compute_mixed, fold
from nf4.integrations.peft.merged import MergedBesideBase
from nf4.layers.group import Alone, grouped
from nf4.layers.linear import does_more
from nf4.models.merge import MergeError, merge_error
from nf4.models.starts import initialize

# Options of LoraConfig that ask for another computation than LoRA's or DoRA's
_OTHER_METHODS = (
    "alora_invocation_tokens",
    "arrow_config",
    "bdlora_config",
    "monteclora_config",
    "use_qalora",
    "velora_config",
)
# Initializations that change the base weight, which is frozen in four bits here
_CHANGE_THE_BASE = ("pissa_niter", "corda", "olora", "loftq", "mica", "lora_ga")


class Magnitude(nn.Module):
    """DoRA's length of each row of the weight, under the name that PEFT's files give it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclass(frozen=True, eq=False)
class _PeftTerm(LoRATerm):
    """The term of PEFT's modules, which are called where hooks bring their parameters.

    Attributes:
        called: the modules of lora_A and lora_B if they are offloaded.
    """

    called: tuple[nn.Module, ...] = ()

    def apply(self, x: Tensor, below: Product, base: Base) -> Tensor:
        """Return what is below plus this adapter, in the dtype of what is below."""
        if not self.called:
            return super().apply(x, below, base)
        if self.magnitude is not None:
            raise ValueError(
                f"DoRA: expected its parameters on {x.device}, got them on meta: offloaded layers "
                "take LoRA without DoRA"
            )
        lora_A, lora_B = self.called
        y = below(x)
        dropped = dropout(x, self.dropout_p).to(self.lora_A.dtype)
        update: Tensor = lora_B(lora_A(dropped)) * self.scaling
        return y + update.to(y.dtype)


def _is_hooked(module: nn.Module) -> bool:
    """Return whether calling a module may bring its parameters, as offloading does."""
    return bool(module._forward_pre_hooks) or "forward" in vars(module)


class NF4LoraLinear(MergedBesideBase, nn.Module, LoraLayer):  # type: ignore[misc]
    """PEFT's adapters on a `LinearNF4`: as many as are added, any of them active.

    One adapter is computed with its base in one call of `nf4.lora_linear`; others are added to it.

    Args:
        base_layer: a `LinearNF4`.
        adapter_name: of the first adapter.
        config: of the first adapter.
        r: its rank.
        lora_alpha: numerator of its scaling.
        **options: what else PEFT passes on.

    Raises:
        ValueError: the config asks for a method or an initialization that is not there.
    """

    # What LoraLayer has; most of it by the name of the adapter
    _check_forward_args: Any
    active_adapters: list[str]
    adapter_layer_names: tuple[str, ...]
    disable_adapters: bool
    merged: bool
    set_adapter: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any
    lora_bias: dict[str, bool]
    use_dora: dict[str, bool]
    r: dict[str, int]
    scaling: dict[str, float]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **options)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.merge_error: MergeError | None = None  # of the last merge
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any
    ) -> None:
        """Add an adapter; PEFT calls this."""
        for name in _OTHER_METHODS:
            if getattr(config, name, None):
                raise ValueError(f"{name}: expected LoRA or DoRA on a LinearNF4, got {name} set")
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
            raise ValueError(
                "init_lora_weights: expected 'pissa' or one that leaves the base weight, got "
                f"{start!r}; for LoftQ see replace_lora_weights_loftq of this module"
            )
        pissa = isinstance(start, str) and start.lower() == "pissa"
        if pissa and self.lora_A:
            raise ValueError(
                "init_lora_weights: expected 'pissa', which changes the base, for a layer's only "
                f"adapter, got it beside {', '.join(self.lora_A)}"
            )
        # PEFT's own DoRA makes the weight dense: it is not told
        told = copy.copy(config)
        told.use_dora = False
        told.init_lora_weights = True if pissa else start
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=told, **options)
        self.use_dora[adapter_name] = config.use_dora
        if pissa:
            self.start("pissa", adapter_name, None)
        if config.use_dora:
            if "lora_magnitude_vector" not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, "lora_magnitude_vector")
            a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
            low = LoRATerm(a, b, self.scaling[adapter_name])
            if a.is_meta:  # low_cpu_mem_usage: the magnitude is read from a file, as A and B are
                norm = torch.empty(b.shape[0], device=b.device)
            else:
                norm = weight_norm(self.base.weight, low)
            self.lora_magnitude_vector[adapter_name] = Magnitude(norm)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def start(self, kind: str, name: str, dense: Tensor | None) -> None:
        """Give an adapter, and the base, the values that `initialize` knows."""
        lora_A, lora_B = self.lora_A[name].weight, self.lora_B[name].weight
        if lora_A.is_meta:
            raise ValueError(f"{kind}: expected an adapter with values, got one on meta")
        start = initialize(kind, self.base.weight, dense, self.r[name], self.scaling[name])
        with torch.no_grad():
            lora_A.copy_(start.lora_A)
            lora_B.copy_(start.lora_B)
        if kind == "pissa":
            self.base._set_weight(start.q)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Tell PEFT the sizes of a layer that it does not know."""
        layer: Any = module
        return layer.in_features, layer.out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base plus the active adapters, ``[..., out_features]`` in the dtype of x."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        alone = None if adapter_names is not None else self.alone()
        if alone is not None:
            y = grouped(self, x)
            return self.base.multiply(x, alone.factors, alone.scaling) if y is None else y
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            base: Tensor = self.base_layer(x)
            return base
        base_product, below = self.base.base(), self._below()
        if adapter_names is not None:
            # "__base__", or an adapter of other layers, is none here
            found = {name: self._adapter(name) for name in set(adapter_names) & set(self.lora_A)}
            mixed = [found.get(name) for name in adapter_names]
            return compute_mixed(x, base_product, mixed, below)
        if self._merged is not None and below is None:
            return self._multiply(x, self._merged, self.base.bias)
        names = self.merged_adapters or self.active_adapters
        active = [self._adapter(name) for name in names if name in self.lora_A]
        if self.merged_adapters:  # folded into a weight, they drop nothing
            active = [replace(adapter, dropout_p=0.0) for adapter in active]
        return compute(x, base_product, active, below)

    def alone(self) -> Alone | None:
        """Return what the layer computes if that is its base and one plain adapter."""
        name = self._only()
        if name is None:
            return None
        factors = (self.lora_A[name].weight, self.lora_B[name].weight)
        if factors[0].is_meta or factors[1].is_meta:  # offloaded: hooks bring them
            return None
        return Alone(self.base, factors, self.scaling[name])

    def _only(self) -> str | None:
        """Return the only active adapter, if there is nothing to compute but it and the base."""
        active: Any = self._active_adapter
        name = active[0] if isinstance(active, list) and len(active) == 1 else active
        if self._disable_adapters or self.merged_adapters or not isinstance(name, str):
            return None
        if name not in self.lora_A or self.use_dora[name] or self.lora_bias[name]:
            return None
        if type(self.scaling[name]) not in (int, float) or does_more(self.base_layer):
            return None
        dropped = self.training and isinstance(self.lora_dropout[name], nn.Dropout)
        return None if dropped and self.lora_dropout[name].p else name

    def _adapter(self, name: str) -> LoRATerm:
        drops = self.lora_dropout[name]
        lora_A, lora_B = self.lora_A[name].weight, self.lora_B[name].weight
        pair = (self.lora_A[name], self.lora_B[name])
        called = pair if lora_A.is_meta and all(map(_is_hooked, pair)) else ()
        return _PeftTerm(
            lora_A,
            lora_B,
            self.scaling[name],
            drops.p if isinstance(drops, nn.Dropout) and self.training else 0.0,
            self.lora_magnitude_vector[name].weight if self.use_dora[name] else None,
            self.lora_B[name].bias if self.lora_bias[name] else None,
            called,
        )

    def exact_merged_weight(self) -> Tensor:
        """Return the dense weight with the active adapters, before it is rounded: float32."""
        active = [self._adapter(name) for name in self.active_adapters if name in self.lora_A]
        return fold(base_of(self.base.weight), active)[0]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return s * B @ A, float32 ``[out_features, in_features]``."""
        a, b = self.lora_A[adapter].weight.float(), self.lora_B[adapter].weight.float()
        delta: Tensor = self.scaling[adapter] * (b @ a)
        return delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into a dense weight that is held beside the quantized one until `unmerge`.

        The sum is taken in fp32 and rounded once to the layer's dtype.

        Args:
            safe_merge: raise ValueError, and change nothing, if the result is not finite.
            adapter_names: all active ones by default.
        """
        names = peft_utils.check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        adapters = [self._adapter(name) for name in (*self.merged_adapters, *names)]
        product = base_of(self.base.weight)
        exact, _ = fold(product, adapters)
        merged = self._hold_merged(exact, names, safe_merge)
        self.merge_error = merge_error("", product.dense(), exact, merged)

    def __repr__(self) -> str:
        """Name the layer as PEFT names its own."""
        return "lora." + super().__repr__()
