"""Which way a CPU multiplies by a quantized weight.

rows of x      what runs
few            one pass over the bytes of W, see nf4/cpu/few_rows.py
more, bf16     slabs of W by the CPU's instructions for bf16, where it has them
more           slabs of W in fp32
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from nf4.tensor import Weight
from nf4.tools.caches import forgettable
from nf4.tools.choice import Choice
from nf4.tools.terms import LowRank

MOST_COLUMNS = 1 << 23  # elements of the narrowest slab of whole columns worth having
# Up to so many rows few_rows beats the product of slabs, in bf16 where the CPU has it or in fp32
FEW_ROWS = {True: 8, False: 16}
# What oneDNN may be told to stay below
_WITHOUT_BF16 = {
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
}


@forgettable
@lru_cache
def multiplies_bf16() -> bool:
    """Return whether the CPU has instructions that multiply bf16, and PyTorch's library uses them.

    Without them the library emulates bf16, slower than fp32.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper() not in _WITHOUT_BF16
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has = any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return bool(has and allowed and torch.backends.mkldnn.enabled)


def in_bf16(dtype: torch.dtype) -> bool:
    """Return whether products of a dtype are taken by instructions for bf16."""
    return dtype == torch.bfloat16 and multiplies_bf16()


def has_column_slabs(rows: int, columns: int, block_size: int) -> bool:
    """Return whether columns of W can be dequantized without the others."""
    return columns % block_size == 0 and rows * block_size <= MOST_COLUMNS


def choose(
    op: str, rows: int, weight: Weight, dtype: torch.dtype, low_rank: LowRank | None = None
) -> Choice:
    """Choose how an operator is computed: by "few rows", "bf16" or "slabs".

    Args:
        op: "linear" or "lora_linear", or one of these with "_backward".
        rows: of x.
        weight: W ``[N, K]``.
        dtype: of x.
        low_rank: the update, of a "lora_linear"; it goes the weight's way.
    """
    (n, k), block_size = weight.shape, weight.block_size
    native = in_bf16(dtype)
    if op.endswith("_backward"):
        return _CHOICES[op, "bf16" if native and has_column_slabs(n, k, block_size) else "slabs"]
    whole = k > 0 and k % block_size == 0
    if dtype != torch.float64 and whole and 1 <= rows <= FEW_ROWS[native]:
        return _CHOICES[op, "few rows"]
    return _CHOICES[op, "bf16" if native else "slabs"]


_REASONS = {
    "few rows": "few rows are multiplied without writing W",
    "bf16": "slabs of W are dequantized and multiplied by the CPU's instructions for bf16",
    "slabs": "slabs of W are dequantized and multiplied",
}
_CHOICES = {
    (op + end, how): Choice(how, f"on a CPU with numba: {said}", None, f"nf4.cpu.{op}.{op}{end}")
    for op in ("linear", "lora_linear")
    for end in ("", "_backward")
    for how, said in _REASONS.items()
}
