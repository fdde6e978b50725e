"""Adapters of every kind on small models, and a fifth kind, whole."""

import copy

import torch
from torch import nn

import nf4
from nf4.adapters.layer import adapted_layers
from nf4.adapters.term import Adapter
from nf4.models.adapt import find_targets, layer_base, put_adapters, with_adapter

TOKENS = torch.arange(24).view(2, 12) % 320


class _Shift:
    """y = below(x) + shift."""

    def __init__(self, shift) -> None:
        self.shift = shift

    def apply(self, x, below, base):
        y = below(x)
        return y + self.shift.to(y.dtype)

    def fold(self, w, bias, base):
        shift = self.shift.detach()
        return w, shift if bias is None else (bias + shift).to(bias.dtype)


class Shift(Adapter):
    """A fifth kind, whole: a learned shift of each output."""

    peft_type = "TEST_SHIFT"
    parts = {"shift": 1}  # noqa: RUF012

    def __init__(self, base) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(base.weight.shape[0], device=base.weight.device))

    def term(self):
        return _Shift(self.shift)

    def tensors(self):
        return {"shift": self.shift}

    @classmethod
    def config_of(cls, layers):
        return {}

    @classmethod
    def check_config(cls, config) -> None:
        pass

    @classmethod
    def from_file(cls, base, config, name, tensors):
        adapter = cls(base)
        adapter.shift.data.copy_(tensors["shift"])
        return adapter


def add_shift(model, target_modules="all-linear", adapter_name="default"):
    targets = find_targets(model, target_modules, adapter_name, Shift)
    return put_adapters(
        model,
        targets,
        lambda _, layer: with_adapter(layer, adapter_name, Shift(layer_base(layer))),
        adapter_name,
    )


ADD = {
    "lora": lambda m, **o: nf4.add_lora(m, r=4, **o),
    "dora": lambda m, **o: nf4.add_lora(m, r=4, use_dora=True, **o),
    "ia3": lambda m, **o: nf4.add_ia3(m, **o),
    "adamix": lambda m, **o: nf4.add_adamix(m, r=4, **o),
    "adamix_share_a": lambda m, **o: nf4.add_adamix(m, r=4, share="A", num_modules=3, **o),
    "adamix_share_b": lambda m, **o: nf4.add_adamix(m, r=4, share="B", num_modules=3, **o),
    "fifth": add_shift,
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def randomize(model: nn.Module, name: str = "default") -> None:
    """Give an adapter values beside its start."""
    torch.manual_seed(4)
    for layer in adapted_layers(model):
        if name in layer.named_adapters():
            for parameter in layer.named_adapters()[name].parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)


def nf4_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nf4.LinearNF4)]


def with_kind(base: nn.Module, kind: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return ADD[kind](copy.deepcopy(base), **options)


def with_lora(base: nn.Module, **options) -> nn.Module:
    torch.manual_seed(0)
    return nf4.add_lora(copy.deepcopy(base), **{"r": 4, "lora_alpha": 8, **options})


def lora_layers(model: nn.Module) -> list[nf4.QLoRALinear]:
    return [m for m in model.modules() if isinstance(m, nf4.QLoRALinear)]
