"""(IA)³: a learned factor of each key, value and inner activation; T-Few trains no more than these.

On keys and values the factor is one of the layer's outputs; in front of the layer that ends a
feed-forward block it is one of its inputs, which are the block's inner activations.
Source: https://arxiv.org/abs/2205.05638, section 3.3; its files are those of PEFT's IA3.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nf4.adapters.factors import InputFactor, OutputFactor
from nf4.adapters.targets import match_targets
from nf4.adapters.term import Adapter, Base, check_plain


class IA3(Adapter):
    """The factors of one layer, float32 ``[out_features]`` or ``[in_features]``, at first one.

    Args:
        base: the layer's product.
        of_inputs: whether inputs are scaled; outputs otherwise.
    """

    peft_type = "IA3"
    parts = {"ia3_l": 2}  # noqa: RUF012

    def __init__(self, base: Base, of_inputs: bool) -> None:
        super().__init__()
        n, k = base.weight.shape
        self.of_inputs = of_inputs
        size, device = k if of_inputs else n, base.weight.device
        self.ia3_l = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))

    def term(self) -> InputFactor | OutputFactor:
        """Return the factor as it is."""
        return InputFactor(self.ia3_l) if self.of_inputs else OutputFactor(self.ia3_l)

    def tensors(self) -> dict[str, Tensor]:
        """Return the factors as PEFT shapes them: ``[1, in_features]`` or ``[out_features, 1]``."""
        return {"ia3_l": self.ia3_l[None] if self.of_inputs else self.ia3_l[:, None]}

    @classmethod
    def config_of(cls, layers: Mapping[str, "IA3"]) -> dict[str, Any]:
        """Return which of the layers have their inputs scaled, as an expression for whole names.

        PEFT takes a list only if it is a part of target_modules as they stand in the file, and
        finds its names at the end of others, dot or no dot.
        """
        wanted = {name for name, adapter in layers.items() if adapter.of_inputs}
        ends = "|".join(re.escape(last) for last in sorted({n.rpartition(".")[2] for n in wanted}))
        inputs: list[str] | str = rf"(.*\.)?({ends})" if wanted else []
        if wanted and match_targets(layers, inputs, "feedforward_modules") != wanted:
            inputs = "|".join(re.escape(name) for name in sorted(wanted))
        return {"feedforward_modules": inputs, "init_ia3_weights": True}

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise ValueError unless a config is of plain (IA)³."""
        harmless = frozenset(["feedforward_modules", "init_ia3_weights"])
        check_plain(config, harmless, {})

    @classmethod
    def from_file(
        cls, base: Base, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
    ) -> "IA3":
        """Return the factors of one layer, new, with the values of a file."""
        (n, k), factors = base.weight.shape, tensors["ia3_l"]
        shape = tuple(factors.shape)
        if shape not in ((n, 1), (1, k)):
            raise ValueError(f"expected ia3_l of shape ({n}, 1) or (1, {k}), got {shape}")
        of_inputs = shape == (1, k)
        if (n, k) == (1, 1):  # both
            of_inputs = bool(match_targets([name], config["feedforward_modules"] or [], "config"))
        return cls(base, of_inputs).copy_from(tensors)

    def summary(self) -> str:
        """Return the options."""
        return f"of_inputs={self.of_inputs}"
