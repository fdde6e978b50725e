"""PEFT's (IA)³ on a `LinearNF4`: the layer that nf4.integrations.peft puts there."""

import math
from collections.abc import Iterable
from typing import Any

import peft.tuners.tuners_utils as peft_utils
import torch
from peft import IA3Config
from peft.tuners.ia3.layer import IA3Layer
from torch import Tensor, nn

from nf4.adapters.factors import InputFactor, OutputFactor
from nf4.adapters.term import Term, base_of, compute, fold
from nf4.integrations.peft.merged import MergedBesideBase


class NF4IA3Linear(MergedBesideBase, nn.Module, IA3Layer):  # type: ignore[misc]
    """PEFT's (IA)³ on a `LinearNF4`: a learned factor for each of its outputs, or inputs.

    Args:
        base_layer: a `LinearNF4`.
        adapter_name: of the first adapter.
        config: of the first adapter.
        is_feedforward: whether inputs are scaled.
        **options: what else PEFT passes on.
    """

    _check_forward_args: Any
    active_adapters: list[str]
    disable_adapters: bool
    ia3_l: Any
    merged: bool
    update_layer: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: IA3Config,
        is_feedforward: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        layer: Any = base_layer
        while isinstance(layer, peft_utils.BaseTunerLayer):
            layer = layer.get_base_layer()
        with torch.device("meta"):  # IA3Layer reads the sizes of a layer that it knows
            sizes = nn.Linear(layer.in_features, layer.out_features)
        IA3Layer.__init__(self, sizes, is_feedforward=is_feedforward)
        self.base_layer = base_layer
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)

    def _factor(self, names: Iterable[str]) -> Tensor | None:
        """Return the product of adapters' factors, ``[in_features]`` or ``[out_features]``."""
        factors = [self.ia3_l[name].flatten() for name in names if name in self.ia3_l]
        if not factors:
            return None
        product: Tensor = math.prod(factors[1:], start=factors[0])
        return product

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the scaled output, ``[..., out_features]`` in the dtype of x."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        below = self._below()
        if self._merged is not None and below is None:
            return self._multiply(x, self._merged, self._merged_bias())
        names = () if self.disable_adapters else self.merged_adapters or self.active_adapters
        return compute(x, self.base.base(), self._terms(names), below)

    def _terms(self, names: Iterable[str]) -> list[Term]:
        """Return what adapters compute: one factor, the product of theirs."""
        factor = self._factor(names)
        if factor is None:
            return []
        return [InputFactor(factor) if self.is_feedforward else OutputFactor(factor)]

    def _merged_bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        factor = None if self.is_feedforward else self._factor(self.merged_adapters)
        if bias is None or factor is None:
            return bias
        return (bias * factor).to(bias.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into a dense weight that is held beside the quantized one until `unmerge`.

        Args:
            safe_merge: raise ValueError, and change nothing, if the result is not finite.
            adapter_names: all active ones by default.
        """
        names = peft_utils.check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.ia3_l]
        if not names:
            return
        terms = self._terms([*self.merged_adapters, *names])
        self._hold_merged(fold(base_of(self.base.weight), terms)[0], names, safe_merge)

    def __repr__(self) -> str:
        """Name the layer as PEFT names its own."""
        return "ia3." + super().__repr__()
