"""A `LinearNF4` with adapters: of any kind, and QLoRALinear, which is made with a low-rank one."""

from operator import attrgetter
from typing import Any, Self

import torch
from torch import Tensor, nn

from nf4.adapters.layer import AdaptedLayer, check_adapter_name
from nf4.adapters.lora import LoRA, check_lora_options
from nf4.adapters.term import Adapter, Base, Folded
from nf4.layers.group import Alone, grouped
from nf4.layers.linear import LinearNF4
from nf4.tensor import NF4Tensor


class AdaptedLinearNF4(AdaptedLayer, LinearNF4):
    """A `LinearNF4` with adapters of any kind."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._start_adapters()

    def _with_one(self, x: Tensor) -> Tensor | None:
        """Return the product with the only adapter, if there is one and it is plain."""
        y = grouped(self, x)
        if y is not None:
            return y
        found = self.alone()
        return None if found is None else self.multiply(x, found.factors, found.scaling)

    def alone(self) -> Alone | None:
        """Return the product with the only adapter, if there is one and it is plain."""
        adapter = self._alone()
        if adapter is None:
            return None
        own = adapter._parameters.get
        lora_A, lora_B = own("lora_A"), own("lora_B")
        if lora_A is None or lora_B is None:
            return None
        factors = (lora_A, lora_B) if self.split is None else adapter.factors()
        given = (self, factors, adapter.scaling)
        return tuple.__new__(Alone, given)  # what Alone(*given) comes to, a call less

    def _alone(self) -> LoRA | None:
        """Return the only adapter that is computed, if it does nothing but what `multiply` can."""
        adapters = self._modules.get("adapters")
        if len(self.active_adapters) != 1 or adapters is None:
            return None
        if self.adapters_disabled or self.samples is not None:
            return None
        adapter = adapters._modules.get(self.active_adapters[0])
        if type(adapter) is not LoRA or adapter.use_dora or adapter.is_hooked:
            return None
        return None if adapter.training and adapter.lora_dropout else adapter

    def base(self) -> Base:
        """Return x W^T + bias on the 4-bit weight."""
        return LinearNF4.base(self)

    def to_base(self) -> LinearNF4:
        """Return the frozen layer without adapters; it shares weight and bias."""
        bias = self.bias if self.split is None else None  # which `take_after` brings
        return LinearNF4.from_weight(self.weight, bias).take_after(self)

    def hold_adapter(self, name: str, adapter: Adapter) -> None:
        """Hold an adapter by a name, also in the place of another."""
        if self.split is not None:
            self.split.share(adapter)
        super().hold_adapter(name, adapter)

    def _merged(self) -> Folded:
        weight, bias = self.exact_merged()
        return weight.to(self.dtype), bias


_PARAMETERS = ("lora_A", "lora_B", "lora_magnitude")


class _OfLora(property):
    """An attribute of a layer that is one of its adapter."""


def _of_lora(name: str) -> Any:
    return _OfLora(attrgetter(f"lora.{name}"), doc=f"``{name}`` of the layer's adapter.")


class QLoRALinear(AdaptedLinearNF4):
    """A `LinearNF4` with a trainable low-rank adapter: y = x W^T + s dropout(x) A^T B^T + bias.

    ``lora_A`` float32 ``[r, in_features]`` starts as PEFT's does and ``lora_B`` float32
    ``[out_features, r]`` at zero, so that the first output equals the base's. s is lora_alpha / r,
    or lora_alpha / sqrt(r) with use_rslora. DoRA learns ``lora_magnitude`` ``[out_features]`` too.

    The adapter is held under ``adapters.<adapter_name>``, beside others that `add_adapter` puts
    there; `active_adapters` says which are computed. Its tensors and options are the layer's too,
    by the names above and those of the arguments.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether the layer adds a bias.
        device: as for `LinearNF4`.
        dtype: as for `LinearNF4`.
        r: rank of the adapter, at least 1.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an input of the adapter in training, in [0, 1).
        use_rslora: divide lora_alpha by sqrt(r) (https://arxiv.org/abs/2312.03732).
        use_dora: learn the length of each row of the weight (https://arxiv.org/abs/2402.09353).
        adapter_name: of the adapter.
        **options: block_size and double_quant of `LinearNF4`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: r is below 1, lora_dropout outside [0, 1), or lora_alpha not finite.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        adapter_name: str = "default",
        **options: Any,
    ) -> None:
        check_lora_options(r, lora_alpha, lora_dropout, use_rslora, use_dora)
        check_adapter_name(adapter_name)
        super().__init__(in_features, out_features, bias, device, dtype, **options)
        own = LoRA(self.base(), r, lora_alpha, lora_dropout, use_rslora, use_dora)
        self._start_with(adapter_name, own)

    def _start_with(self, name: str, adapter: LoRA) -> Self:
        """Have an adapter, the one that the layer's own names mean, and compute it."""
        self.adapter_name = name
        self._start_adapters(name)
        self.hold_adapter(name, adapter)
        return self

    @classmethod
    def from_weight(cls, q: NF4Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """Make a layer with a new adapter around a quantized weight; as `LinearNF4.from_weight`."""
        layer = super().from_weight(q, bias, **options)
        return layer._start_with(layer.adapter_name, LoRA(layer.base(), **layer.lora.options))

    @classmethod
    def with_lora(cls, layer: LinearNF4, name: str, adapter: LoRA) -> Self:
        """Make a layer of a frozen one, whose weight and bias it shares, and its adapter."""
        # Its own adapter, on meta, is not drawn: a seed gives 4-bit and dense layers one start
        bias = layer.bias if layer.split is None else None  # which `take_after` brings
        new = super().from_weight(layer.weight, bias, adapter_name=name, **adapter.options)
        return new.take_after(layer)._start_with(name, adapter)

    # What of its adapter is the layer's too
    lora_A, lora_B = _of_lora("lora_A"), _of_lora("lora_B")
    lora_magnitude = _of_lora("lora_magnitude")
    r, lora_alpha, scaling = _of_lora("r"), _of_lora("lora_alpha"), _of_lora("scaling")
    lora_dropout = _of_lora("lora_dropout")
    use_rslora, use_dora = _of_lora("use_rslora"), _of_lora("use_dora")

    @property
    def lora(self) -> LoRA:
        """The adapter that the layer was made with, or one that took its place."""
        adapter = self.named_adapters().get(self.adapter_name)
        if not isinstance(adapter, LoRA):
            raise AttributeError("lora")  # of which nn.Module makes a sentence
        return adapter

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickle of an earlier version too, whose adapter was the layer itself."""
        parameters = state.get("_parameters", {})
        own = {n: parameters.pop(n) for n in _PARAMETERS if n in parameters}
        super().__setstate__(state)
        if own:
            adapter = LoRA.__new__(LoRA)
            nn.Module.__init__(adapter)
            names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
            adapter._set_options(*(self.__dict__.pop(name) for name in names))
            for name, parameter in own.items():
                adapter.register_parameter(name, parameter)
            others, self.adapters = self.named_adapters(), None
            for name, one in {self.adapter_name: adapter, **others}.items():
                self.hold_adapter(name, one)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is the adapter's there."""
        if isinstance(getattr(QLoRALinear, name, None), _OfLora):
            setattr(self.lora, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the adapter also from where earlier versions saved it, among the layer's own."""
        for name in _PARAMETERS:
            if prefix + name in state_dict:
                new = f"{prefix}adapters.{self.adapter_name}.{name}"
                state_dict[new] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)
