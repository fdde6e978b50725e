"""What PEFT's layers on a `LinearNF4` share: the dense weight they hold while merged."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nf4.adapters.term import Called
from nf4.layers.linear import LinearNF4, does_more


class MergedBesideBase:
    """A dense weight beside the quantized one, which is never changed, from merge to unmerge."""

    base_layer: nn.Module
    get_base_layer: Any
    merge: Any
    merged_adapters: list[str]
    _merged: Tensor | None = None  # dense, while adapters are merged

    @property
    def base(self) -> LinearNF4:
        """The quantized layer."""
        layer: LinearNF4 = self.get_base_layer()
        return layer

    def _below(self) -> Called | None:
        """Return the layer beneath if it has to be called: it does more than its product."""
        return Called(self.base_layer) if does_more(self.base_layer) else None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the layer without adapters: quantized, or dense with what has been merged.

        PEFT calls this.
        """
        if merge:
            self.merge(safe_merge, adapter_names)
        if self._merged is None:
            return self.base
        bias = self._merged_bias()
        dense: Any = self.base.to_dense(nn.Parameter(self._merged))
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().to(self.base.dtype))
        module: nn.Module = dense
        return module

    def _merged_bias(self) -> Tensor | None:
        """Return the bias with merged adapters."""
        bias: Tensor | None = self.base.bias
        return bias

    def _hold_merged(self, exact: Tensor, names: list[str], safe_merge: bool) -> Tensor:
        """Hold a float32 weight, rounded to the layer's dtype, in which adapters are; return it."""
        merged = exact.to(self.base.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"adapter {', '.join(names)}: expected finite weights after merging")
        self._merged = merged
        self.merged_adapters.extend(names)
        return merged

    @staticmethod
    def _multiply(x: Tensor, merged: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, merged.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def unmerge(self) -> None:
        """Drop the dense weight: the quantized one was never changed."""
        self._merged = None
        self.merged_adapters.clear()
