"""Multiply very few rows by fragments: y = f * (x @ W.T + scaling * t @ lora_B.T + bias).

As nf4/reference/matmul_small.py, with levels as they are, in fp32.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

import torch
from torch import Tensor

from nf4.reference.matmul_small import matmul_by_levels
from nf4.tensor import Weight
from nf4.tools.terms import PLAIN_SUMS, Epilogue


def matmul_row(x: Tensor, weight: Weight, epilogue: Epilogue = PLAIN_SUMS) -> Tensor:
    """Return y; arguments and result as of nf4/reference/matmul.py."""
    return matmul_by_levels(torch.float32, x, weight, epilogue)
