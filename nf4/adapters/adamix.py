"""AdaMix: a mixture of LoRA modules on each layer, drawn at random in training, averaged after it.

In training each forward of a layer draws one A and, apart from it, one B; both come from torch's
generator, as dropout masks do: ``torch.manual_seed`` repeats them, gradient checkpointing draws
them again alike, and a compiled model draws anew at each call without being compiled again. In
evaluation, and when merged, the layer has the mean of the As and the mean of the Bs: one LoRA
adapter, at LoRA's cost.
Source: https://arxiv.org/abs/2205.12410, section 3.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nf4.adapters.lora import (
    LoRATerm,
    by_pattern,
    check_lora_config,
    check_lora_options,
    lora_scaling,
    options_of,
)
from nf4.adapters.term import Adapter, Base, check_plain, single
from nf4.ops.checks import check_int

SHARES = (None, "A", "B")


class AdaMix(Adapter):
    """The modules of one layer: ``lora_A`` ``[M, r, in_features]``, ``lora_B`` ``[M, out, r]``.

    Both are float32. Each A starts as PEFT starts one, each B at zero, so that the first output is
    the base's. What is shared is one module alone.

    Args:
        base: the layer's product.
        r: rank of each module.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an input of the adapter in training.
        num_modules: M.
        share: None, "A" or "B".
    """

    peft_type = "NF4_ADAMIX"  # no method of PEFT's
    parts = {"lora_A.weight": 3, "lora_B.weight": 3}  # noqa: RUF012

    def __init__(
        self,
        base: Base,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        num_modules: int,
        share: str | None,
    ) -> None:
        super().__init__()
        (n, k), device = base.weight.shape, base.weight.device
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.num_modules, self.share = num_modules, share
        as_, bs = (1 if share == name else num_modules for name in ("A", "B"))
        a = torch.empty(as_, r, k, dtype=torch.float32, device=device)
        for module in a:
            nn.init.kaiming_uniform_(module, a=math.sqrt(5))
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(bs, n, r, dtype=torch.float32, device=device))

    @property
    def scaling(self) -> float:
        """Factor of the adapter's output."""
        return lora_scaling(self.r, self.lora_alpha, use_rslora=False)

    @property
    def options_of_lora(self) -> dict[str, Any]:
        """What `LoRA` makes the adapter by that a mixture comes to."""
        own = {name: getattr(self, name) for name in ("r", "lora_alpha", "lora_dropout")}
        return {**own, "use_rslora": False, "use_dora": False}

    def term(self) -> LoRATerm:
        """Return one A and one B: drawn in training, the mean of all in evaluation."""
        if not self.training:
            return self.merged_term()
        a, b = _draw(self.lora_A), _draw(self.lora_B)
        return LoRATerm(a, b, self.scaling, self.lora_dropout)

    def merged_term(self) -> LoRATerm:
        """Return the mean of the As and the mean of the Bs."""
        return LoRATerm(self.lora_A.mean(dim=0), self.lora_B.mean(dim=0), self.scaling)

    def tensors(self) -> dict[str, Tensor]:
        """Return what files hold, all modules in one tensor."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def fits(self, other: Adapter) -> bool:
        """Return whether this mixture can take on the values of another."""
        same = isinstance(other, AdaMix) and other.share == self.share
        return same and super().fits(other)

    def take(self, other: "AdaMix") -> None:
        """Take on the options and values of another mixture of the same form."""
        self.lora_alpha, self.lora_dropout = other.lora_alpha, other.lora_dropout
        super().take(other)

    @classmethod
    def config_of(cls, layers: Mapping[str, "AdaMix"]) -> dict[str, Any]:
        """Return the options; ranks and alphas that differ go into patterns."""
        return {
            **{o: single(layers, o) for o in ("lora_dropout", "num_modules", "share")},
            **by_pattern(layers, "r", "rank_pattern"),
            **by_pattern(layers, "lora_alpha", "alpha_pattern"),
        }

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError unless a config is of a mixture."""
        own = ["r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"]
        check_plain(config, frozenset([*own, "num_modules", "share"]), {})
        check_lora_config(config)
        check_mixture(config.get("num_modules"), config.get("share"))

    @classmethod
    def from_file(
        cls, base: Base, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
    ) -> "AdaMix":
        """Return the modules of one layer, new, with the values of a file."""
        options = options_of(config, name)
        if options.pop("use_rslora") or options.pop("use_dora"):
            raise ValueError("expected a mixture of plain LoRA modules, got use_rslora or use_dora")
        check_lora_options(**options)
        options |= {"num_modules": config["num_modules"], "share": config.get("share")}
        like = cls(Base(torch.empty(base.weight.shape, device="meta")), **options).tensors()
        expected = {part: tuple(tensor.shape) for part, tensor in like.items()}
        found = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
        if found != expected:
            raise ValueError(f"expected tensors of shapes {expected}, got {found}")
        return cls(base, **options).copy_from(tensors)

    def summary(self) -> str:
        """Return the options."""
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"num_modules={self.num_modules}, share={self.share}"
        )


def _draw(modules: Tensor) -> Tensor:
    """Return one of several modules; which, the host does not wait to know."""
    if len(modules) == 1:
        return modules[0]
    index = torch.randint(len(modules), (1,), device=modules.device)
    return modules.index_select(0, index)[0]


def check_mixture(num_modules: Any, share: Any) -> None:
    """Raise TypeError or ValueError unless a mixture can have so many modules, so shared."""
    check_int(num_modules, "num_modules", 1)
    if share not in SHARES:
        raise ValueError(f"share: expected None, 'A' or 'B', got {share!r}")
