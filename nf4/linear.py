"""Linear layers on a 4-bit weight: LinearNF4, frozen, and QLoRALinear, with a trainable adapter."""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from nf4.dispatch import wants_fragments
from nf4.functional import (
    check_block_size,
    check_dropout,
    check_weight,
    dequantize,
    linear,
    quantize,
    to_fragments,
    to_rows,
)
from nf4.lora import LowRank, adapted_linear, fold, mixed_linear, weight_norm
from nf4.quantized_module import QuantizedModule
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
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {size}")
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
        return linear(input, self.weight, self.bias)

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
        conv: Any = self.conv1d.__new__(self.conv1d)
        nn.Module.__init__(conv)
        conv.nf, conv.nx = self.out_features, self.in_features
        conv.weight = nn.Parameter(dense.weight.detach().T.contiguous())
        conv.bias = dense.bias
        module: nn.Module = conv.train(self.training)
        return module

    def to_linear(self, weight: Tensor | None = None) -> nn.Linear:
        """Return a ``torch.nn.Linear`` with `merged_weight`; it shares a bias of the same dtype.

        Args:
            weight: what to take instead of `merged_weight`, of the same shape and dtype.
        """
        weight = self.merged_weight() if weight is None else weight
        dense = nn.Linear(
            self.in_features, self.out_features, bias=False, device="meta", dtype=self.dtype
        )
        dense.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        if self.bias is not None and self.bias.dtype != self.dtype:
            dense.bias = nn.Parameter(self.bias.detach().to(self.dtype))
        elif self.bias is not None:
            dense.bias = self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, dtype={self.dtype}"
        )


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


class LoRA(nn.Module):
    """The parameters of one adapter: ``lora_A``, ``lora_B`` and, with DoRA, ``lora_magnitude``.

    ``lora_A`` float32 ``[r, in_features]`` starts as PEFT's does and ``lora_B`` float32
    ``[out_features, r]`` at zero; ``lora_magnitude`` float32 ``[out_features]`` at the length of
    each row of the weight. The options are those of `QLoRALinear`.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None

    def _set_options(
        self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, use_dora: bool
    ) -> None:
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora, self.use_dora = use_rslora, use_dora

    def _make_adapter(self, q: NF4Tensor) -> None:
        (n, k), options = q.shape, {"dtype": torch.float32, "device": q.device}
        self.lora_A = nn.Parameter(torch.empty(self.r, k, **options))  # type: ignore[call-overload]
        self.lora_B = nn.Parameter(torch.zeros(n, self.r, **options))  # type: ignore[call-overload]
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.register_parameter("lora_magnitude", None)
        if self.use_dora:
            self.lora_magnitude = nn.Parameter(weight_norm(q))

    @classmethod
    def of(cls, q: NF4Tensor, **options: Any) -> "LoRA":
        """Return a new adapter for a quantized weight."""
        adapter = cls()
        adapter._set_options(**options)
        adapter._make_adapter(q)
        return adapter

    @torch.no_grad()
    def start_from(self, q: NF4Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
        """Set the adapter's values, and the lengths to those of W + s B A."""
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(weight_norm(q, self.low_rank()))

    @property
    def scaling(self) -> float:
        """Factor of the adapter's output."""
        return lora_scaling(self.r, self.lora_alpha, self.use_rslora)

    def parameters_of_adapter(self) -> list[nn.Parameter]:
        """Return what is trained of the adapter."""
        found = (self.lora_A, self.lora_B, self.lora_magnitude)
        return [p for p in found if p is not None]

    def low_rank(self) -> LowRank:
        """Return what the adapter computes with, dropout only in training."""
        dropout_p = self.lora_dropout if self.training else 0.0
        return LowRank(self.lora_A, self.lora_B, self.scaling, dropout_p, self.lora_magnitude)

    def extra_repr(self) -> str:
        """Describe the adapter in ``print(model)``."""
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, "
            f"use_rslora={self.use_rslora}, use_dora={self.use_dora}"
        )


class QLoRALinear(LinearNF4, LoRA):
    """A `LinearNF4` with a trainable low-rank adapter: y = x W^T + s dropout(x) A^T B^T + bias.

    ``lora_A`` float32 ``[r, in_features]`` starts as PEFT's does and ``lora_B`` float32
    ``[out_features, r]`` at zero, so that the first output equals the base's. s is lora_alpha / r,
    or lora_alpha / sqrt(r) with use_rslora. DoRA learns ``lora_magnitude`` ``[out_features]`` too.

    The first adapter's parameters are the layer's own; `add_adapter` puts others beside it, under
    ``adapters.<name>``, and `active_adapters` says which are computed.

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
        adapter_name: of the first adapter.
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
        self._set_options(r, lora_alpha, lora_dropout, use_rslora, use_dora)
        self.adapter_name = adapter_name
        self.active_adapters: tuple[str, ...] = (adapter_name,)
        self.adapters: nn.ModuleDict | None = None  # further ones
        self.base_change: BaseChange | None = None
        self.trained_biases = "none"  # of the model, beside the adapter: see nf4.add_lora
        self.adapters_disabled = False
        self.samples: tuple[str | None, ...] | None = None  # adapters of a batch's samples
        self._make_adapter(self.weight)

    @classmethod
    def from_weight(cls, q: NF4Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """Make a layer with a new adapter around a quantized weight; as `LinearNF4.from_weight`."""
        layer = super().from_weight(q, bias, **options)
        layer._make_adapter(q)
        return layer

    def add_adapter(self, name: str, adapter: LoRA) -> None:
        """Put another adapter beside the first; it is not active yet.

        Raises:
            ValueError: the layer has an adapter of that name.
        """
        check_adapter_name(name)
        if name in self.named_adapters():
            raise ValueError(f"expected a name without adapter, got {name!r}, which is taken")
        if self.adapters is None:
            self.adapters = nn.ModuleDict()
        self.adapters[name] = adapter.train(self.training)

    def named_adapters(self) -> dict[str, LoRA]:
        """Return the adapters by name, the first one being the layer itself."""
        more: Any = () if self.adapters is None else self.adapters.items()
        return {self.adapter_name: self, **dict(more)}

    def set_adapter(self, *names: str) -> None:
        """Compute and train these adapters and no others; none for the base alone.

        Names of adapters that are on other layers only mean none here.
        """
        adapters = self.named_adapters()
        self.active_adapters = tuple(name for name in dict.fromkeys(names) if name in adapters)
        for name, adapter in adapters.items():
            for parameter in adapter.parameters_of_adapter():
                parameter.requires_grad_(name in self.active_adapters)

    def forward(self, input: Tensor) -> Tensor:
        """Return base plus active adapters, ``[..., out_features]`` in the dtype of input."""
        if self.adapters_disabled:
            return linear(input, self.weight, self.bias)
        adapters = self.named_adapters()
        if self.samples is not None:
            low = {name: adapter.low_rank() for name, adapter in adapters.items()}
            samples = [None if name is None else low.get(name) for name in self.samples]
            return mixed_linear(input, self.weight, self.bias, samples)
        active = [adapters[name].low_rank() for name in self.active_adapters]
        return adapted_linear(input, self.weight, self.bias, active)

    def merged_weight(self) -> Tensor:
        """Return the dense weight, active adapters added in fp32 and rounded once to `dtype`."""
        return self.exact_merged_weight().to(self.dtype)

    def exact_merged_weight(self) -> Tensor:
        """Return `merged_weight` before it is rounded to `dtype`: float32."""
        adapters = self.named_adapters()
        active = [adapters[name].low_rank() for name in self.active_adapters]
        return fold(dequantize(self.weight, torch.float32), self.weight, active)

    def to_base(self) -> LinearNF4:
        """Return the frozen layer without the adapter; it shares weight and bias."""
        return LinearNF4.from_weight(self.weight, self.bias).take_after(self)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"{LinearNF4.extra_repr(self)}, {LoRA.extra_repr(self)}"


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return the factor of an adapter's output."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


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


def check_lora_options(
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> None:
    """Raise TypeError or ValueError unless an adapter can be made with these options."""
    for name, value in (("use_rslora", use_rslora), ("use_dora", use_dora)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r: expected an int, got {type(r).__name__}")
    if r < 1:
        raise ValueError(f"r: expected an int of at least 1, got {r}")
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, int | float):
        raise TypeError(f"lora_alpha: expected a number, got {type(lora_alpha).__name__}")
    if not math.isfinite(lora_alpha) or lora_alpha <= 0:
        raise ValueError(f"lora_alpha: expected a finite number above 0, got {lora_alpha}")
    check_dropout(lora_dropout, "lora_dropout")
