"""PEFT's LoRA on quantized layers, computed by nf4's fused layer.

    import nf4.integrations.peft
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", ...))

Importing this module is all: from then on PEFT puts `NF4LoraLinear` on each `LinearNF4` that it
targets, in `get_peft_model`, `PeftModel.from_pretrained` and `add_adapter` alike. Adapters, their
files and all that PEFT does with them stay PEFT's. LoRA, rsLoRA and DoRA; PEFT 0.21.
Sources: LoRA (https://arxiv.org/abs/2106.09685), rsLoRA (https://arxiv.org/abs/2312.03732),
DoRA (https://arxiv.org/abs/2402.09353).
"""

import copy
import functools
from collections.abc import Iterable
from typing import Any

import peft.tuners.lora.model as peft_lora
import peft.tuners.tuners_utils as peft_utils
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from nf4.functional import dequantize, dequantize_rows, lora_linear
from nf4.linear import LinearNF4, QLoRALinear

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
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "mica", "lora_ga")
_ROWS = 256  # of W that are dense at a time


class Magnitude(nn.Module):
    """DoRA's length of each row of the weight, under the name that PEFT's files give it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class NF4LoraLinear(nn.Module, LoraLayer):  # type: ignore[misc]
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
    get_base_layer: Any
    merged: bool
    set_adapter: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any
    lora_bias: dict[str, bool]
    use_dora: dict[str, bool]
    scaling: dict[str, float]
    merged_adapters: list[str]

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
        # Squared length of each row of W, and of which bytes
        self._norms: tuple[tuple[int, int], Tensor] | None = None
        self._merged: Tensor | None = None  # dense, while adapters are merged
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
                f"init_lora_weights: expected one that leaves the base weight, got {start!r}"
            )
        # PEFT's own DoRA makes the weight dense: it is not told
        told = copy.copy(config)
        told.use_dora = False
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=told, **options)
        self.use_dora[adapter_name] = config.use_dora
        if config.use_dora:
            if "lora_magnitude_vector" not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, "lora_magnitude_vector")
            with torch.no_grad():
                norm = self._weight_norm(adapter_name)
            self.lora_magnitude_vector[adapter_name] = Magnitude(norm)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Tell PEFT the sizes of a layer that it does not know."""
        layer: Any = module
        return layer.in_features, layer.out_features

    @property
    def base(self) -> LinearNF4:
        """The quantized layer."""
        layer: LinearNF4 = self.get_base_layer()
        return layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base plus the active adapters, ``[..., out_features]`` in the dtype of x."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            base: Tensor = self.base(x)
            return base
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        if self._merged is not None:
            bias = None if self.base.bias is None else self.base.bias.to(x.dtype)
            return nn.functional.linear(x, self._merged.to(x.dtype), bias)
        names = [name for name in self.active_adapters if name in self.lora_A]
        y: Tensor
        plain = [name for name in names if not self.use_dora[name] and not self.lora_bias[name]]
        if not plain:
            y = self.base(x)
        else:
            first = plain[0]
            dropout = self.lora_dropout[first]
            p = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
            a, b = self.lora_A[first].weight, self.lora_B[first].weight
            y = lora_linear(x, self.base.weight, a, b, self.scaling[first], self.base.bias, p)
            names.remove(first)
        for name in names:
            y = y + self._update(x, name)
        return y

    def _update(self, x: Tensor, name: str) -> Tensor:
        """Return what an adapter adds to the output."""
        update: Tensor
        a, b = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
        linear = nn.functional.linear
        if self.use_dora[name]:
            x = self.lora_dropout[name](x)
            update = linear(linear(x, a), b) * self.scaling[name]
            # The norm is taken as a constant, as DoRA has it (section 4.3)
            norm = self._weight_norm(name).detach()
            ratio = (self.lora_magnitude_vector[name].weight / norm).to(x.dtype)
            without_bias = self.base(x)
            if self.base.bias is not None:
                without_bias = without_bias - self.base.bias.to(x.dtype)
            update = (ratio - 1) * without_bias + ratio * update
        else:
            update = linear(linear(self.lora_dropout[name](x), a), b) * self.scaling[name]
        if self.lora_bias[name]:
            update = update + (self.lora_B[name].bias * self.scaling[name]).to(x.dtype)
        return update

    def _mixed(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Return the output of a batch whose samples name an adapter each."""
        y: Tensor = self.base(x)
        for name in dict.fromkeys(adapter_names):
            if name not in self.lora_A:
                continue  # "__base__", or an adapter of other layers
            rows = [i for i, wanted in enumerate(adapter_names) if wanted == name]
            y[rows] = y[rows] + self._update(x[rows], name)
        return y

    def _weight_norm(self, name: str) -> Tensor:
        """Return the length of each row of W + s * B @ A, without making that sum.

        |w + s b A|^2 = |w|^2 + 2 s b.(A w) + s^2 b (A A^T) b for a row w of W and b of B.
        """
        a, b = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()
        s, packed = self.scaling[name], self.base.packed
        version = (packed.data_ptr(), packed._version)
        known = self._norms is not None and self._norms[0] == version
        cross, squares = [], []
        for rows, w in dequantize_rows(self.base.weight, _ROWS, torch.float32):
            cross.append(((w @ a.T) * b[rows]).sum(dim=1))
            if not known:
                squares.append(w.square().sum(dim=1))
        if not known:
            self._norms = (version, torch.cat(squares))
        assert self._norms is not None
        own = ((b @ (a @ a.T)) * b).sum(dim=1)
        square: Tensor = self._norms[1] + 2 * s * torch.cat(cross) + s * s * own
        return square.clamp_min(0).sqrt()

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
        w = dequantize(self.base.weight, torch.float32)
        with torch.no_grad():
            for name in (*self.merged_adapters, *names):
                w = self._folded(w, name)
        merged = w.to(self.base.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"adapter {', '.join(names)}: expected finite weights after merging")
        self._merged = merged
        self.merged_adapters.extend(names)

    def _folded(self, w: Tensor, name: str) -> Tensor:
        if self.lora_bias[name]:
            raise ValueError(f"adapter {name}: expected one without a bias to merge, got lora_bias")
        w = w + self.get_delta_weight(name)
        if self.use_dora[name]:
            ratio = self.lora_magnitude_vector[name].weight / self._weight_norm(name)
            w = ratio[:, None] * w
        return w

    def unmerge(self) -> None:
        """Drop the dense weight: the quantized one was never changed."""
        self._merged = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the layer without adapters: quantized, or dense with adapters folded in."""
        if not merge:
            return self.base
        self.merge(safe_merge, adapter_names)
        if self._merged is None:
            return self.base
        dense = self.base.to_linear()
        dense.weight = nn.Parameter(self._merged)
        return dense

    def __repr__(self) -> str:
        """Name the layer as PEFT names its own."""
        return "lora." + super().__repr__()


def _on_nf4(target: nn.Module) -> bool:
    if isinstance(target, peft_utils.BaseTunerLayer):
        target = target.get_base_layer()
    if isinstance(target, QLoRALinear):
        raise ValueError(
            "expected a LinearNF4 without adapter, got a QLoRALinear: add adapters with "
            "nf4.add_lora or with PEFT, not with both"
        )
    return isinstance(target, LinearNF4)


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
            names = {n for n, m in model.named_modules() if isinstance(m, LinearNF4)}
            others: Iterable[str] = found.target_modules
            found.target_modules = names | ({others} if isinstance(others, str) else set(others))
        return found

    dispatch.knows_nf4 = True  # type: ignore[attr-defined]
    peft_lora.dispatch_default = dispatch
    peft_utils._maybe_include_all_linear_layers = include


_install()
