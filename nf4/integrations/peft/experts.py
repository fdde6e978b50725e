"""PEFT's LoRA on the experts of a mixture in four bits: what ``target_parameters`` asks for.

PEFT adapts the two tensors that transformers keeps all experts in, each by one adapter with a pair
of factors an expert, in files ``lora_A`` ``[r * experts, in]``, ``lora_B`` ``[out, r * experts]``.
Here the experts are a layer each, and each is given its pair.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import peft.tuners.lora.layer as peft_lora
import peft.tuners.tuners_utils as peft_utils
import torch
from torch import nn

from nf4.adapters.lora import LoRATerm
from nf4.adapters.term import Term
from nf4.integrations.peft.parameters import named_otherwise
from nf4.layers.experts import PARTS, ExpertsNF4, ExpertTerm, layer_product


class _Parameter:
    """What PEFT asks of a parameter that all experts' weights are in."""

    requires_grad = False
    ndim = 3

    def __init__(self, experts: ExpertsNF4, part: str) -> None:
        weight = layer_product(experts.layers(part)[0]).weight
        self.shape = torch.Size((experts.num_experts, *weight.shape))
        self.dtype, self.device = weight.dtype, weight.device


class ParamWrapper(peft_lora.ParamWrapper):  # type: ignore[misc]
    """PEFT's adapters on one of the two weights of `ExpertsNF4`; PEFT goes by this name of it."""

    active_adapters: list[str]
    base_layer: nn.Module
    get_base_layer: Any
    lora_A: Any
    lora_B: Any
    merged_adapters: list[str]
    num_experts: int
    parameter_name: str
    scaling: dict[str, float]

    def get_param(self) -> Any:
        """Return what stands for the parameter."""
        return _Parameter(self.get_base_layer(), self.parameter_name)

    def _term(self, name: str) -> ExpertTerm:
        """Return what an adapter computes, by the number of the expert."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        a = a.view(self.num_experts, -1, a.shape[-1])
        b = b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1).contiguous()
        scaling = self.scaling[name]

        def term(expert: int) -> Term:
            return LoRATerm(a[expert], b[expert], scaling)

        return term

    def active_terms(self) -> tuple[ExpertTerm, ...]:
        """Return what the active adapters compute, by the number of the expert."""
        return tuple(self._term(name) for name in self.active_adapters if name in self.lora_A)

    @contextmanager
    def _activate_lora(self, active_adapters: Sequence[str]) -> Iterator[None]:
        """Let the experts compute with adapters within a ``with`` block."""
        experts: ExpertsNF4 = self.get_base_layer()
        before = experts.terms
        own = tuple(self._term(name) for name in active_adapters if name in self.lora_A)
        experts.terms = {**before, self.parameter_name: own}
        try:
            yield
        finally:
            experts.terms = before

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into dense weights that are held beside the quantized ones until `unmerge`.

        Args:
            safe_merge: nothing more: what is not finite is always refused, and nothing changed.
            adapter_names: all active ones by default.
        """
        names = peft_utils.check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        terms = [self._term(name) for name in (*self.merged_adapters, *names)]
        self.get_base_layer().merge(self.parameter_name, terms)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Drop the dense weights."""
        self.get_base_layer().unmerge(self.parameter_name)
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the experts without adapters: quantized, or dense with what has been merged."""
        experts: ExpertsNF4
        experts = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return experts.to_experts() if experts.merged else experts


def parameters_of_experts(model: nn.Module) -> AbstractContextManager[None]:
    """Let PEFT find the two weights of `ExpertsNF4` by their names within a ``with`` block."""
    found = (module for module in model.modules() if isinstance(module, ExpertsNF4))
    return named_otherwise(found, _named)


def _named(experts: ExpertsNF4, *args: Any, **options: Any) -> Iterator[tuple[str, Any]]:
    if options.get("recurse", True):
        return nn.Module.named_parameters(experts, *args, **options)
    return iter([(part, None) for part in PARTS])
