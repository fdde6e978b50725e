"""How a quantized weight and a low-rank update stand in schemas, and how operators pack them.

Schemas are flat, for torch.library knows tensors and numbers alone; what computes takes a `Weight`
and a `LowRank`. An operator packs its arguments once.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nf4.tensor import Weight
from nf4.tools.terms import NO_DROPOUT, Dropout, LowRank

WEIGHT = "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset"
LAYOUT = "str layout='rows'"
LOW_RANK = "Tensor lora_A, Tensor lora_B, float scaling, float dropout_p, Tensor? seed"


def parts_of(a: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return packed, absmax, absmax2 and offset among an operator's arguments."""
    return a.packed, a.absmax, a.absmax2, a.offset


def weight_of(a: Any, shape: Sequence[int]) -> Weight:
    """Return the weight among an operator's arguments."""
    parts = (a.packed, a.absmax, a.absmax2, a.offset, shape, a.block_size, a.layout)
    return tuple.__new__(Weight, parts)  # what Weight(*parts) comes to, a call less


def low_rank_of(a: Any) -> LowRank:
    """Return the low-rank update among an operator's arguments."""
    drops = Dropout(a.dropout_p, a.seed) if a.dropout_p or a.seed is not None else NO_DROPOUT
    return tuple.__new__(LowRank, (a.lora_A, a.lora_B, a.scaling, drops))
