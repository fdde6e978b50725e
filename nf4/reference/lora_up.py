"""The output side of an adapter: drop(scaling * t @ b) / (1 - p) + bias, rounded once.

With b = lora_B.T it is what an adapter adds to y; with t = u and b = lora_A, its part of the
gradient of x, where dropout comes last.
Source: LoRA (https://arxiv.org/abs/2106.09685, section 4.1).
"""

from torch import Tensor

from nf4.reference.dropout_mask import drop
from nf4.reference.linear import accumulator
from nf4.tools.terms import Dropout


def lora_up(t: Tensor, b: Tensor, scaling: float, bias: Tensor | None, dropout: Dropout) -> Tensor:
    """Return the sum.

    Args:
        t: float16 or bfloat16 ``[M, r]``.
        b: floating ``[r, N]``, of any strides, rounded to the dtype of t.
        scaling: factor of the product.
        bias: floating ``[N]`` or None.
        dropout: of the product.

    Returns:
        dtype of t ``[M, N]``.
    """
    acc = accumulator(t.dtype)
    product = scaling * (t.to(acc) @ b.to(t.dtype).to(acc))
    out = drop(product, dropout) / (1 - dropout.p)
    return (out if bias is None else out + bias.to(acc)).to(t.dtype)
