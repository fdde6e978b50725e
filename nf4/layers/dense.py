"""Dense linear layers with adapters, in the place of torch.nn.Linear and transformers' Conv1D."""

import torch
from torch import Tensor, nn

from nf4.adapters.layer import AdaptedLayer
from nf4.adapters.term import Base
from nf4.layers.linear import dense_weight, is_conv1d, make_conv1d, make_linear


class AdaptedDense(AdaptedLayer):
    """A dense linear layer with adapters of any kind; weight and bias keep their names.

    Args:
        layer: a ``torch.nn.Linear`` or transformers' ``Conv1D``; its parameters are shared.

    Raises:
        TypeError: layer is of another kind, or a subclass with a forward of its own.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.out_features, self.in_features = dense_weight(layer).shape
        self.conv1d = type(layer) if is_conv1d(layer) else None
        for name in ("weight", "bias"):
            parameter: nn.Parameter | None = getattr(layer, name)
            self.register_parameter(name, parameter)
        self._start_adapters()
        self.train(layer.training)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the weight, and of one that adapters are merged into."""
        return self.weight.dtype

    def base(self) -> Base:
        """Return x W^T + bias on the dense weight."""
        return Base(self.weight if self.conv1d is None else self.weight.T, self.bias)

    def to_base(self) -> nn.Module:
        """Return the dense layer without adapters; it shares weight and bias."""
        return self._make(self.weight, self.bias)

    def to_dense(self, weight: Tensor | None = None) -> nn.Module:
        """Return a ``torch.nn.Linear`` or Conv1D with the active adapters folded in.

        Args:
            weight: what to take instead of the merged weight, of the same shape and dtype.
        """
        bias: Tensor | None = self.bias
        if weight is None:
            exact, bias = self.exact_merged()
            weight = exact.to(self.dtype)
        return self._make(weight if self.conv1d is None else weight.T.contiguous(), bias)

    def _make(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        if self.conv1d is None:
            return make_linear(weight, bias).train(self.training)
        return make_conv1d(self.conv1d, weight, bias).train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
