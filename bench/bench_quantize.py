"""Quantize with double quantization, block 64: nf4 against bitsandbytes and a copy.

python bench/bench_quantize.py
"""

import cases
import measure
import torch

import nf4
from nf4.reference import quantize as reference


def make(shape: tuple[int, int], dtype: torch.dtype) -> tuple[dict[str, measure.Function], int]:
    """Return what to time on one shape, and the bytes it moves."""
    w = torch.randn(shape, device=cases.DEVICE, dtype=dtype)
    q = nf4.quantize(w)
    cases.check_equal(q.packed.flatten(), reference.quantize(w, 64)[0], "quantize")
    functions: dict[str, measure.Function] = {"nf4": lambda: nf4.quantize(w)}
    peer = cases.bitsandbytes()
    if peer:
        functions["bitsandbytes"] = lambda: peer.quantize_4bit(
            w, quant_type="nf4", compress_statistics=True
        )
    return functions, q.nbytes + w.nbytes


if __name__ == "__main__":
    measure.print_table("quantize", cases.COLUMNS, cases.rows(make))
