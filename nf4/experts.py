"""The experts of a mixture, which transformers keeps as two tensors of three dimensions, in 4 bits.

An expert is down(act(gate) * up) with gate and up side by side in one product. Each becomes two
`LinearNF4`, so that adapters, files and devices work on experts as on any layer.
Source: Mixtral (https://arxiv.org/abs/2401.04088, section 2.1).
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nf4.adapted import AdaptedLayer
from nf4.linear import LinearNF4

PARTS = ("gate_up_proj", "down_proj")
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
            weights = enumerate(getattr(source, name))
            names = {expert_name(i): w for i, w in weights}
            self.add_module(
                name, nn.ModuleDict({n: make(f"{name}.{n}", w) for n, w in names.items()})
            )
        # What `to_experts` gives back, without its weights; no part of the model
        self.__dict__["skeleton"] = _without_weights(experts)
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
        gate_up_proj, down_proj = self.get_submodule(PARTS[0]), self.get_submodule(PARTS[1])
        for expert, (gate_up, down) in enumerate(
            zip(gate_up_proj.children(), down_proj.children(), strict=True)
        ):
            token, slot = torch.where(top_k_index == expert)
            gate, up = gate_up(hidden_states[token]).chunk(2, dim=-1)
            y = down(self.act_fn(gate) * up) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

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
            layers: Any = self.get_submodule(name).children()
            weights = [
                m.merged_weight() if isinstance(m, LinearNF4 | AdaptedLayer) else m.weight.detach()
                for m in layers
            ]
            setattr(dense, name, nn.Parameter(torch.stack(weights)))
        return dense.train(self.training)


def _without_weights(experts: nn.Module) -> nn.Module:
    """Return a copy of a module whose parameters are on the meta device."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in experts.parameters()}
    return copy.deepcopy(experts, memo)
