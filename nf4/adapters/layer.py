"""Linear layers with adapters: which they have, which are computed, and what they come to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nf4.adapters.term import Adapter, Base, Folded, compute, compute_mixed, fold


@dataclass(frozen=True)
class BaseChange:
    """What has changed a layer's weight for an adapter, which fits no other weight then.

    Attributes:
        kind: "pissa".
        r: rank that was taken out of the weight.
        from_original: whether out of the weight before quantization.
        adapter_name: of the adapter.
    """

    kind: str
    r: int
    from_original: bool
    adapter_name: str

    def __str__(self) -> str:
        """Describe it in messages."""
        source = "the original weight" if self.from_original else "the 4-bit weight"
        return f"changed by {self.kind} of rank {self.r} from {source}"


class AdaptedLayer(nn.Module):
    """A linear layer with any number of adapters, of any kinds, by name.

    Adapters are held under ``adapters.<name>``, and `active_adapters` says which are computed, in
    turn. A subclass is a linear layer too, and tells its product by `base`, itself without
    adapters by `to_base`, with them folded in by `to_dense`, and by `dtype` what they round to.
    """

    adapters: nn.ModuleDict | None
    dtype: torch.dtype

    def _start_adapters(self, *active: str) -> None:
        self.active_adapters: tuple[str, ...] = active
        self.adapters = None
        self.base_change: BaseChange | None = None
        self.trained_biases = "none"  # of the model, beside the adapter: see nf4.add_lora
        self.adapters_disabled = False
        self.samples: tuple[str | None, ...] | None = None  # adapters of a batch's samples

    def base(self) -> Base:
        """Return the layer's product without adapters."""
        raise NotImplementedError

    def to_base(self) -> nn.Module:
        """Return the frozen layer without adapters; it shares weight and bias."""
        raise NotImplementedError

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Put another adapter beside those there are; it is not active yet.

        Raises:
            ValueError: the layer has an adapter of that name.
        """
        check_adapter_name(name)
        if name in self.named_adapters():
            raise ValueError(f"expected a name without adapter, got {name!r}, which is taken")
        self.hold_adapter(name, adapter)

    def hold_adapter(self, name: str, adapter: Adapter) -> None:
        """Hold an adapter by a name, also in the place of another."""
        if self.adapters is None:
            self.adapters = nn.ModuleDict()
        self.adapters[name] = adapter.train(self.training)

    def named_adapters(self) -> dict[str, Adapter]:
        """Return the adapters by name, in the order in which they were added."""
        if self.adapters is None:
            return {}
        return {n: adapter for n, adapter in self.adapters.items() if isinstance(adapter, Adapter)}

    def set_adapter(self, *names: str) -> None:
        """Compute and train these adapters and no others; none for the base alone.

        Names of adapters that are on other layers only mean none here.
        """
        adapters = self.named_adapters()
        self.active_adapters = tuple(name for name in dict.fromkeys(names) if name in adapters)
        for name, adapter in adapters.items():
            for parameter in adapter.parameters():
                parameter.requires_grad_(name in self.active_adapters)

    def forward(self, input: Tensor) -> Tensor:
        """Return base with active adapters, ``[..., out_features]`` in the dtype of input."""
        y = self._with_one(input)
        if y is not None:
            return y
        if self.adapters_disabled:
            return self.base()(input)
        base, active = self.base(), self.active_adapters
        if self.samples is not None:
            adapters = self.named_adapters()
            terms = {name: adapters[name].called() for name in adapters if name in self.samples}
            samples = [None if name is None else terms.get(name) for name in self.samples]
            return compute_mixed(input, base, samples)
        if len(active) == 1 and self.adapters is not None:  # what `compute` comes to
            adapter: Any = self.adapters[active[0]]
            found: Tensor = adapter.called().apply(input, base, base)
            return found
        adapters = self.named_adapters()
        return compute(input, base, [adapters[name].called() for name in active])

    def _with_one(self, x: Tensor) -> Tensor | None:
        """Return the output by a shorter way, where a subclass has one for its only adapter."""
        return None

    def exact_merged(self) -> Folded:
        """Return the weight, float32, and the bias with the active adapters folded in."""
        adapters = self.named_adapters()
        return fold(self.base(), [adapters[name].merged_term() for name in self.active_adapters])

    def merged_weight(self) -> Tensor:
        """Return the dense weight, active adapters folded in in fp32, rounded once to `dtype`."""
        return self.exact_merged_weight().to(self.dtype)

    def exact_merged_weight(self) -> Tensor:
        """Return `merged_weight` before it is rounded to `dtype`: float32."""
        return self.exact_merged()[0]


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """Return the layers of a model that have adapters, each once."""
    return [module for module in model.modules() if isinstance(module, AdaptedLayer)]


def check_adapter_name(name: str) -> None:
    """Raise TypeError or ValueError unless name can be that of an adapter."""
    if not isinstance(name, str):
        raise TypeError(f"adapter_name: expected a string, got {type(name).__name__}")
    if not name or "." in name:
        raise ValueError(f"adapter_name: expected a name without dots, got {name!r}")
    if hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name: expected a name that torch.nn.ModuleDict can hold, got {name!r}"
        )
