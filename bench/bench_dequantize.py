"""Dequantize with double quantization, block 64: nf4 against bitsandbytes and a copy.

python bench/bench_dequantize.py
"""

import cases
import measure
import torch

import nf4
from nf4.reference import dequantize as reference


def make(shape: tuple[int, int], dtype: torch.dtype) -> tuple[dict[str, measure.Function], int]:
    """Return what to time on one shape, and the bytes it moves."""
    w = torch.randn(shape, device=cases.DEVICE, dtype=dtype)
    q = nf4.quantize(w)
    expected = reference.dequantize(
        q.packed, q.absmax, q.absmax2, q.offset, shape, q.block_size, dtype
    )
    cases.check_equal(nf4.dequantize(q), expected, "dequantize")
    functions: dict[str, measure.Function] = {"nf4": lambda: nf4.dequantize(q)}
    peer = cases.bitsandbytes()
    if peer:
        packed, state = peer.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        functions["bitsandbytes"] = lambda: peer.dequantize_4bit(packed, state)
    return functions, q.nbytes + w.nbytes


if __name__ == "__main__":
    measure.print_table("dequantize", cases.COLUMNS, cases.rows(make))
