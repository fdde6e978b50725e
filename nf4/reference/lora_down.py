"""The input side of an adapter: t = drop(x) @ lora_A.T / (1 - p), sums in fp32, rounded once.

drop sets elements to zero with probability p, as nf4/reference/dropout_mask.py says.
Source: LoRA (https://arxiv.org/abs/2106.09685, section 4.1).
"""

from torch import Tensor

from nf4.reference.dropout_mask import drop
from nf4.reference.linear import accumulator
from nf4.tools.terms import Dropout


def lora_down(x: Tensor, lora_A: Tensor, dropout: Dropout, out: Tensor | None = None) -> Tensor:
    """Return t.

    Args:
        x: float16 or bfloat16 ``[M, K]``.
        lora_A: floating ``[r, K]``, rounded to the dtype of x.
        dropout: of x.
        out: dtype of x ``[M, r]``, contiguous, to be filled and returned; new by default.

    Returns:
        dtype of x ``[M, r]``.
    """
    acc = accumulator(x.dtype)
    t = drop(x.to(acc), dropout) @ lora_A.to(x.dtype).to(acc).T
    t = (t / (1 - dropout.p)).to(x.dtype)
    return t if out is None else out.copy_(t)
