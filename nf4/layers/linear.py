"""LinearNF4, a frozen linear layer on a 4-bit weight, and what is linear and dense."""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from nf4.adapters.term import Base, Folded, QuantizedBase
from nf4.functional import dequantize, quantize, to_fragments, to_rows
from nf4.layers.group import Alone, grouped
from nf4.layers.module import QuantizedModule
from nf4.ops import replay
from nf4.ops.checks import check_block_size, check_int, check_weight
from nf4.ops.choice import wants_fragments
from nf4.ops.products import multiply_in_layer
from nf4.tensor import NF4Tensor, check_nf4
from nf4.tools.ranks import is_sharded


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

    The weight is held as plain tensors, so that ``state_dict``, ``.to`` and sharding need no
    special case, as in `NF4Tensor`: frozen parameters ``packed`` uint8 ``[out_features,
    in_features / 2]`` and ``absmax``, and with double quantization buffers ``absmax2`` and
    ``offset``. Casting the module changes the bias and `dtype`, never the bytes or fp32 scales.

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
            if old.split is not None:
                old.split.carry(old, self)
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
        if q.device.type == "meta" or is_sharded(q.packed):
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
        y = grouped(self, input)
        return self.multiply(input) if y is None else y

    def base(self) -> Base:
        """Return x W^T + bias on the 4-bit weight."""
        return QuantizedBase(self.held(), self._own_bias(), self.replays())

    def _own_bias(self) -> Tensor | None:
        """Return the bias; of a layer that is split, what its part adds to the product."""
        return self.bias if self.split is None else self.split.bias(self.bias)

    def multiply(
        self,
        x: Tensor,
        factors: tuple[Tensor, Tensor] | tuple[()] = (),
        scaling: float | None = None,
    ) -> Tensor:
        """Return the product, with lora_A and lora_B on it or nothing, the shortest way known."""
        replays = None if torch.compiler.is_compiling() else self.__dict__.get("_replays")
        if replays:
            own, buffer = self._parameters.get, self._buffers.get
            parts: replay.Parts
            bias: Tensor | None
            parts = (own("packed"), own("absmax"), buffer("absmax2"), buffer("offset"))
            bias = own("bias") if "bias" in self._parameters else self.bias  # may be computed
            if self.split is not None:
                parts = (parts[0], buffer("absmax"), *self.split.scales(self))
                bias = self.split.bias(bias)
            y = replay.again(replays, parts, self.block_size, x, (bias, *factors), scaling)
            if y is not None:
                return y
        bias = self._own_bias()
        return multiply_in_layer(x, self.held(), bias, self.replays(), factors, scaling)

    def alone(self) -> Alone | None:
        """Return what the layer computes, for a `Group`."""
        return Alone(self)

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
        self.check_whole("merge")
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
            + ("" if self.split is None else f", split={self.split}")
        )
