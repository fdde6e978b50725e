"""What a product is given beside x and W: a low-rank update, its dropout, what is done to sums."""

from typing import NamedTuple

from torch import Tensor


class Dropout(NamedTuple):
    """Which elements are set to zero, and what the others are divided by: 1 - p.

    Attributes:
        p: probability of dropping an element, in [0, 1).
        seed: int64 ``[]`` of the mask, see nf4/reference/dropout_mask.py; None if nothing is
            dropped here.
    """

    p: float = 0.0
    seed: Tensor | None = None


NO_DROPOUT = Dropout()


class LowRank(NamedTuple):
    """An adapter's term: scaling * dropout(x) @ lora_A.T @ lora_B.T.

    Attributes:
        lora_A: floating ``[r, K]``, rounded to the dtype of x.
        lora_B: floating ``[N, r]``, rounded to the dtype of x.
        scaling: factor of the term.
        dropout: of x before lora_A.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    dropout: Dropout = NO_DROPOUT


class Epilogue(NamedTuple):
    """What becomes of sums: factor * (sums + scaling * t @ lora_B.T + bias).

    Attributes:
        bias: floating ``[N]`` or None.
        t: dtype of x ``[M, r]``, x @ lora_A.T; None for no low-rank term.
        lora_B: floating ``[N, r]``, rounded to the dtype of x; None with t.
        scaling: factor of the low-rank term, not 0.
        factor: floating ``[N]``, of each output, or None.
    """

    bias: Tensor | None = None
    t: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    factor: Tensor | None = None


PLAIN_SUMS = Epilogue()
