"""The experts of a mixture, which transformers keeps as two tensors of three dimensions, in 4 bits.

An expert is down(act(gate) * up) with gate and up side by side in one product. Each becomes two
`LinearNF4`, so that adapters, files and devices work on experts as on any layer.
Source: Mixtral (https://arxiv.org/abs/2401.04088, section 2.1).
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from nf4.adapters.layer import AdaptedLayer
from nf4.adapters.term import Base, Called, Term, base_of, compute
from nf4.layers.linear import LinearNF4, does_more

PARTS = ("gate_up_proj", "down_proj")
ExpertTerm = Callable[[int], Term]  # what an adapter computes on the expert of a number
# Experts were called by their number alone, which is also a layer's of the model
_NUMBERED = re.compile(rf"(^|\.)({'|'.join(PARTS)})\.(\d+)(?=\.|$)")


def expert_name(number: int) -> str:
    """Return the name of an expert's layer within one of the `PARTS`: no other module has it."""
    return f"expert_{number}"


def with_expert_names(name: str) -> str:
    """Return the name of a tensor or module, experts that it calls by number by their name."""
    return _NUMBERED.sub(lambda m: f"{m[1]}{m[2]}.{expert_name(int(m[3]))}", name)


def is_experts(module: nn.Module) -> bool:
    """Return whether a module keeps experts as ``gate_up_proj`` and ``down_proj``, in that form.

    Kinds with biases, transposed or interleaved weights, or a gate of their own are not meant.
    """
    gate_up, down = (getattr(module, name, None) for name in PARTS)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter):
        return False
    if gate_up.ndim != 3 or not callable(getattr(module, "act_fn", None)):
        return False
    own_gate = getattr(getattr(type(module), "_apply_gate", None), "__name__", "") not in (
        "",
        "_default_apply_gate",
    )
    other = [getattr(module, name, False) for name in ("has_bias", "is_transposed")]
    other += [not getattr(module, name, True) for name in ("has_gate", "is_concatenated")]
    other += [getattr(module, "has_post_expert_norm", False), own_gate]
    experts, two_i, hidden = gate_up.shape
    return not any(other) and tuple(down.shape) == (experts, hidden, two_i // 2)


class ExpertsNF4(nn.Module):
    """Experts with frozen 4-bit weights, in the place of transformers' module of them.

    Args:
        experts: the module, see `is_experts`; left unchanged.
        make: makes the layer of an expert, by its name within this module and its dense weight
            ``[out_features, in_features]``.
    """

    def __init__(self, experts: nn.Module, make: Callable[[str, Tensor], nn.Module]) -> None:
        super().__init__()
        source: Any = experts
        self.num_experts = len(source.gate_up_proj)
        self.act_fn = source.act_fn
        for name in PARTS:
            weights = zip(self.names, getattr(source, name), strict=True)
            layers = {n: make(f"{name}.{n}", weight) for n, weight in weights}
            self.add_module(name, nn.ModuleDict(layers))
        # What `to_experts` gives back, without its weights; no part of the model
        self.__dict__["skeleton"] = _without_weights(experts)
        # By `PARTS`, beside the layers' own: terms of adapters on all experts at once, and dense
        # weights that such adapters have been folded into. Replaced as a whole, never changed
        self.terms: Mapping[str, tuple[ExpertTerm, ...]] = {}
        self.merged: Mapping[str, Sequence[Tensor]] = {}
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts that each token was sent to.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: integer ``[tokens, k]``; an expert that is not here computes nothing.
            top_k_weights: ``[tokens, k]``.

        Returns:
            ``[tokens, hidden]`` in the dtype of hidden_states.
        """
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            gate_up = self._multiply("gate_up_proj", expert, hidden_states[token])
            gate, up = gate_up.chunk(2, dim=-1)
            y = self._multiply("down_proj", expert, self.act_fn(gate) * up)
            out.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(out.dtype))
        return out

    @property
    def names(self) -> list[str]:
        """The experts' names within each of the `PARTS`."""
        return [expert_name(number) for number in range(self.num_experts)]

    def layers(self, part: str) -> list[nn.Module]:
        """Return the experts' layers of one of the `PARTS`."""
        return list(self.get_submodule(part).children())

    def _multiply(self, part: str, expert: int, x: Tensor) -> Tensor:
        """Return the output of an expert's layer, with what adapters on all experts add."""
        if part in self.merged:
            return dense_linear(x, self.merged[part][expert].to(x.dtype))
        layer: Any = self.get_submodule(part).get_submodule(expert_name(expert))
        terms = [term(expert) for term in self.terms.get(part, ())]
        if not terms:
            y: Tensor = layer(x)
            return y
        base = layer_product(layer)
        return compute(x, base, terms, Called(layer) if does_more(layer) else None)

    @torch.no_grad()
    def merge(self, part: str, terms: Sequence["ExpertTerm"]) -> None:
        """Hold dense weights into which adapters on all experts are folded, until `unmerge`.

        Args:
            part: one of the `PARTS`.
            terms: of the adapters, beside those on single layers.

        Raises:
            ValueError: a weight is not finite.
        """
        found = []
        for expert, layer in enumerate(self.layers(part)):
            w = self.exact_weight(part, expert, terms).to(layer_product(layer).weight.dtype)
            if not w.isfinite().all():
                raise ValueError(
                    f"{part}.{expert_name(expert)}: expected finite weights after merging, got "
                    "NaN or an infinity"
                )
            found.append(w)
        self.merged = {**self.merged, part: found}

    @torch.no_grad()
    def exact_weight(self, part: str, expert: int, terms: Sequence["ExpertTerm"]) -> Tensor:
        """Return an expert's weight, adapters of its layer and of all experts folded in: float32.

        Args:
            part: one of the `PARTS`.
            expert: its number.
            terms: of the adapters on all experts.
        """
        layer: Any = self.layers(part)[expert]
        exact = getattr(layer, "exact_merged_weight", None)
        w: Tensor = layer.weight.detach().float() if exact is None else exact()
        for term in terms:
            w, _ = term(expert).fold(w, None, layer_product(layer))
        return w

    def unmerge(self, part: str) -> None:
        """Drop the dense weights: the quantized ones were never changed."""
        self.merged = {p: held for p, held in self.merged.items() if p != part}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the names of experts that were called by their number too."""
        for key in [k for k in state_dict if k.startswith(prefix)]:
            new = prefix + with_expert_names(key[len(prefix) :])
            if new != key:
                state_dict[new] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def to_experts(self) -> nn.Module:
        """Return transformers' module with dense weights, adapters folded in."""
        dense: nn.Module = copy.deepcopy(self.__dict__["skeleton"])
        for name in PARTS:
            held = self.merged.get(name)
            weights = [_weight(m) for m in self.layers(name)] if held is None else list(held)
            setattr(dense, name, nn.Parameter(torch.stack(weights)))
        return dense.train(self.training)


def layer_product(layer: Any) -> Base:
    """Return the product of an expert's layer without adapters, in four bits or dense."""
    while hasattr(layer, "get_base_layer"):  # PEFT's
        layer = layer.get_base_layer()
    known = isinstance(layer, AdaptedLayer | LinearNF4)
    return layer.base() if known else base_of(layer.weight)


def _weight(layer: Any) -> Tensor:
    """Return the dense weight of an expert's layer, adapters of its own folded in."""
    weight: Tensor
    if isinstance(layer, LinearNF4 | AdaptedLayer):
        weight = layer.merged_weight()
    else:
        weight = layer.weight.detach()
    return weight


def _without_weights(experts: nn.Module) -> nn.Module:
    """Return a copy of a module whose parameters are on the meta device."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in experts.parameters()}
    return copy.deepcopy(experts, memo)
