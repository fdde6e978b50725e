"""The input side of an adapter: t = drop(x) @ lora_A.T / (1 - p), sums in fp32, rounded once.

drop sets elements to zero with probability p, as nf4/reference/dropout_mask.py says.
Source: LoRA (https://arxiv.org/abs/2106.09685, section 4.1).
"""

from torch import Tensor

from nf4.reference.dropout_mask import drop
from nf4.reference.linear import accumulator


def lora_down(
    x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Return t.

    Args:
        x: float16 or bfloat16 ``[M, K]``.
        lora_A: floating ``[r, K]``, rounded to the dtype of x.
        dropout_p: probability of dropping an element of x, in [0, 1).
        seed: int64 ``[]`` of the dropout mask; None for no dropout.
        out: dtype of x ``[M, r]``, contiguous, to be filled and returned; new by default.

    Returns:
        dtype of x ``[M, r]``.
    """
    acc = accumulator(x.dtype)
    t = drop(x.to(acc), dropout_p, seed) @ lora_A.to(x.dtype).to(acc).T
    t = (t / (1 - dropout_p)).to(x.dtype)
    return t if out is None else out.copy_(t)
