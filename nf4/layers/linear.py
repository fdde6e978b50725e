"""Linear layers on a 4-bit weight: LinearNF4, frozen, and QLoRALinear, with a trainable adapter."""

import math
from operator import attrgetter
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from nf4.adapters.layer import AdaptedLayer, check_adapter_name
from nf4.adapters.lora import LoRA, check_lora_options
from nf4.adapters.term import Base, Folded, QuantizedBase
from nf4.functional import dequantize, quantize, to_fragments, to_rows
from nf4.layers.module import QuantizedModule
from nf4.ops import replay
from nf4.ops.checks import check_block_size, check_int, check_weight
from nf4.ops.choice import wants_fragments
from nf4.ops.products import multiply_in_layer
from nf4.tensor import NF4Tensor, check_nf4


def is_conv1d(module: nn.Module) -> bool:
    """Return whether module is transformers' Conv1D, a linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Return whether module is a ``torch.nn.Linear`` that computes as one."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight ``[out_features, in_features]`` of an nn.Linear or transformers' Conv1D.

    Raises:
        TypeError: module is of another kind, or a subclass with a forward of its own.
    """
    if is_linear(module):
        linear_weight: Tensor = module.weight  # type: ignore[assignment]
        return linear_weight
    if is_conv1d(module):
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.T
    raise TypeError(
        f"expected torch.nn.Linear or transformers' Conv1D, got {type(module).__name__}"
    )


def does_more(layer: nn.Module) -> bool:
    """Return whether calling a layer does more than the product of a `LinearNF4`.

    It has hooks, a forward of its own (as accelerate's offloading gives it), or is another layer.
    """
    if type(layer) is not LinearNF4 or "forward" in vars(layer):
        return True
    hooked: bool = _has_any_global_hook()  # type: ignore[no-untyped-call]
    return hooked or any(getattr(layer, hooks) for hooks in _HOOKS)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a layer around a dense weight and bias; it shares parameters of the weight's dtype."""
    n, k = weight.shape
    dense = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
    dense.weight = _as_parameter(weight)
    dense.bias = None if bias is None else _as_parameter(bias, weight.dtype)  # type: ignore[assignment]
    return dense


def make_conv1d(kind: type[nn.Module], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return transformers' Conv1D around a weight ``[in_features, out_features]`` and a bias."""
    conv: Any = kind.__new__(kind)
    nn.Module.__init__(conv)
    conv.nx, conv.nf = weight.shape
    conv.weight = _as_parameter(weight)
    conv.bias = None if bias is None else _as_parameter(bias, weight.dtype)
    module: nn.Module = conv
    return module


def _as_parameter(tensor: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Return a tensor itself, if it is a parameter of a dtype, or a parameter with its values."""
    if isinstance(tensor, nn.Parameter) and dtype in (None, tensor.dtype):
        return tensor
    return nn.Parameter(tensor.detach().to(dtype or tensor.dtype))


class LinearNF4(QuantizedModule):
    """A drop-in for ``torch.nn.Linear`` with a frozen weight in 4-bit NormalFloat.

    The weight is held as plain frozen parameters, so that ``state_dict``, ``.to`` and sharding need
    no special case: ``packed`` uint8 ``[out_features, in_features / 2]``, ``absmax``, and with
    double quantization ``absmax2`` and ``offset``, as in `NF4Tensor`. Casting the module changes
    the bias and `dtype`, never the bytes or the fp32 scales.

    On a GPU with kernels for the weight's shape, ``packed`` and ``absmax`` are held in the order
    that tensor cores read (`layout` "fragments"), from the moment the layer arrives there;
    elsewhere, and in every ``state_dict``, in rows. `to_rows` and `to_fragments` change it.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether the layer adds a trainable bias.
        device: where to make the weight, by default as torch does.
        dtype: dtype of the bias and of the dequantized weight, by default torch's default dtype.
        block_size: elements that share one scale, a power of two from 32 to 4096.
        double_quant: quantize the scales to 8 bits too.

    The weight is initialized as by ``torch.nn.Linear`` and quantized; `from_linear` takes one that
    exists.

    Raises:
        TypeError: an argument has the wrong type, or dtype is not float32, float16 or bfloat16.
        ValueError: a size is below 1, or block_size is not supported.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block_size: int = 64,
        double_quant: bool = True,
    ) -> None:
        super().__init__()
        check_int(in_features, "in_features", 1)
        check_int(out_features, "out_features", 1)
        self.in_features, self.out_features = in_features, out_features
        self.conv1d: type[nn.Module] | None = None  # transformers' class, of a layer that was one
        w = torch.empty(out_features, in_features, device=device, dtype=dtype)
        check_weight(w, "dtype")
        nn.init.kaiming_uniform_(w, a=math.sqrt(5))
        self._set_weight(quantize(w, check_block_size(block_size), double_quant))
        self.register_parameter("bias", None)
        if bias:
            bound = 1 / math.sqrt(in_features)
            self.bias = nn.Parameter(w.new_empty(out_features).uniform_(-bound, bound))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        scale: str = "absmax",
        weights: Tensor | None = None,
        **options: Any,
    ) -> Self:
        """Quantize a ``torch.nn.Linear`` or transformers' ``Conv1D``.

        Args:
            linear: the layer; left unchanged. Its bias is shared, not copied.
            block_size: elements that share one scale.
            double_quant: quantize the scales to 8 bits too.
            scale: how scales are found, see `nf4.quantize`.
            weights: ``[in_features]``, what columns count in that search.
            **options: of an adapter, such as r and lora_alpha.

        Raises:
            TypeError: linear is of another kind, or a subclass with a forward of its own.
            ValueError: a weight is NaN or infinite, scale is not known, or weights do not fit.
        """
        weight = dense_weight(linear)
        bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
        q = quantize(weight, block_size, double_quant, scale=scale, weights=weights, check=True)
        layer = cls.from_weight(q, bias, **options)
        return layer.take_after(linear)

    def take_after(self, old: nn.Module) -> Self:
        """Take on what a layer in the place of another keeps of it: its mode, and its class.

        Args:
            old: a dense layer, or one of this class.
        """
        if isinstance(old, LinearNF4):
            self.conv1d = old.conv1d
        elif is_conv1d(old):
            self.conv1d = type(old)
        return self.train(old.training)

    @classmethod
    def from_weight(cls, q: NF4Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """Make a layer around a quantized weight ``[out_features, in_features]``.

        Args:
            q: the weight; shared, not copied.
            bias: floating ``[out_features]`` or None; shared, not copied.
            **options: of an adapter, such as r and lora_alpha.

        Raises:
            TypeError: q is no NF4Tensor.
            ValueError: q is no matrix, or bias has another shape.
        """
        check_nf4(q)
        if q.ndim != 2:
            raise ValueError(f"q: expected a quantized matrix [N, K], got shape {tuple(q.shape)}")
        out_features, in_features = q.shape
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"bias: expected shape ({out_features},), got {tuple(bias.shape)}")
        layer = cls(
            in_features,
            out_features,
            bias=False,
            block_size=q.block_size,
            double_quant=q.double_quant,
            device="meta",
            dtype=torch.float32,
            **options,
        )
        layer._set_weight(q)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def _weight_shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def _choose_layout(self) -> None:
        """Hold the weight in fragments where there are kernels for it, in rows elsewhere."""
        q = self.weight
        if q.device.type == "meta":
            return
        if q.layout == "rows" and wants_fragments(q.shape, q.block_size, q.device):
            self.to_fragments()
        elif q.layout == "fragments" and q.device.type != "cuda":
            self.to_rows()

    def to_fragments(self) -> Self:
        """Hold the weight in the order that tensor cores read; lossless. Returns the layer.

        Raises:
            ValueError: the weight's shape does not go into whole tiles and blocks.
        """
        return self._hold(to_fragments(self.weight))

    def to_rows(self) -> Self:
        """Hold the weight in rows, as files do; lossless. Returns the layer."""
        return self._hold(to_rows(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ W.T + bias, ``[..., out_features]`` in the dtype of input."""
        return self.multiply(input)

    def base(self) -> Base:
        """Return x W^T + bias on the 4-bit weight."""
        return QuantizedBase(self.held(), self.bias, self.replays())

    def multiply(
        self,
        x: Tensor,
        factors: tuple[Tensor, Tensor] | tuple[()] = (),
        scaling: float | None = None,
    ) -> Tensor:
        """Return the product, with lora_A and lora_B on it or nothing, the shortest way known."""
        replays = self.__dict__.get("_replays")
        if replays and not torch.compiler.is_compiling():
            own = self._parameters.get
            parts = (own("packed"), own("absmax"), own("absmax2"), own("offset"))
            bias = own("bias") if "bias" in self._parameters else self.bias  # may be computed
            y = replay.again(replays, parts, self.block_size, x, (bias, *factors), scaling)
            if y is not None:
                return y
        return multiply_in_layer(x, self.held(), self.bias, self.replays(), factors, scaling)

    def merged_weight(self) -> Tensor:
        """Return the dense weight ``[out_features, in_features]`` in `dtype`."""
        return dequantize(self.weight)

    def exact_merged_weight(self) -> Tensor:
        """Return `merged_weight` before it is rounded to `dtype`: float32."""
        return dequantize(self.weight, torch.float32)

    def to_dense(self, weight: Tensor | None = None) -> nn.Module:
        """Return what `to_linear` does, or transformers' Conv1D for what was one.

        Args:
            weight: as for `to_linear`.
        """
        dense = self.to_linear(weight)
        if self.conv1d is None:
            return dense
        turned = dense.weight.detach().T.contiguous()
        return make_conv1d(self.conv1d, turned, dense.bias).train(self.training)

    def to_linear(self, weight: Tensor | None = None) -> nn.Linear:
        """Return a ``torch.nn.Linear`` with `merged_weight`; it shares a bias of the same dtype.

        Args:
            weight: what to take instead of `merged_weight`, of the same shape and dtype; adapters
                are left out of the bias then.
        """
        weight, bias = self._merged() if weight is None else (weight, self.bias)
        return make_linear(weight, bias).train(self.training)

    def _merged(self) -> Folded:
        """Return the dense weight in `dtype`, and the bias."""
        return self.merged_weight(), self.bias

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, dtype={self.dtype}"
        )


class AdaptedLinearNF4(AdaptedLayer, LinearNF4):
    """A `LinearNF4` with adapters of any kind."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._start_adapters()

    def _with_one(self, x: Tensor) -> Tensor | None:
        """Return the product with the only adapter, if there is one and it is plain."""
        adapter = self._alone()
        if adapter is None:
            return None
        own = adapter._parameters
        lora_A, lora_B = own["lora_A"], own["lora_B"]
        if lora_A is None or lora_B is None:
            return None
        return self.multiply(x, (lora_A, lora_B), adapter.scaling)

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
        return LinearNF4.from_weight(self.weight, self.bias).take_after(self)

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
        new = super().from_weight(layer.weight, layer.bias, adapter_name=name, **adapter.options)
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
        super().__setstate__(state)  # type: ignore[no-untyped-call]
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
