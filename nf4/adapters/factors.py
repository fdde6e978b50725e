"""Terms that scale a layer's inputs or outputs: y = f (x W^T + bias), or y = (f x) W^T + bias.

Right on a 4-bit weight the factor is part of its product, `nf4.linear`.
Source: (IA)³ (https://arxiv.org/abs/2205.05638, section 3.3).
"""

from dataclasses import dataclass

from torch import Tensor

from nf4.adapters.term import Base, Folded, Product


@dataclass(frozen=True, eq=False)
class OutputFactor:
    """A factor of each output.

    Attributes:
        factor: floating ``[N]``.
    """

    factor: Tensor

    def apply(self, x: Tensor, below: Product, base: Base) -> Tensor:
        """Return factor times what is below, in its dtype; the product is rounded once."""
        return below.scale_outputs(x, self.factor)

    def fold(self, w: Tensor, bias: Tensor | None, base: Base) -> Folded:
        """Return the rows of W and the bias times the factor."""
        bias = None if bias is None else (bias * self.factor).to(bias.dtype)
        return w.mul_(self.factor[:, None]), bias


@dataclass(frozen=True, eq=False)
class InputFactor:
    """A factor of each input.

    Attributes:
        factor: floating ``[K]``.
    """

    factor: Tensor

    def apply(self, x: Tensor, below: Product, base: Base) -> Tensor:
        """Return what is below of x times the factor, which is rounded to the dtype of x."""
        return below.scale_inputs(x, self.factor)

    def fold(self, w: Tensor, bias: Tensor | None, base: Base) -> Folded:
        """Return the columns of W times the factor, and the bias as it is."""
        return w.mul_(self.factor), bias
