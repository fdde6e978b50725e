"""Double quantization of the scales alone, those of a weight in blocks of 64, against a copy.

python bench/bench_quantize_absmax.py
"""

import cases
import measure
import torch

from nf4.reference import quantize_absmax as reference


def make(shape: tuple[int, int], dtype: torch.dtype) -> tuple[dict[str, measure.Function], int]:
    """Return what to time on one shape, and the bytes it moves; scales are fp32 whatever dtype."""
    absmax = torch.rand(shape[0] * shape[1] // 64, device=cases.DEVICE) + 0.5
    run = torch.ops.nf4.quantize_absmax
    for ours, expected in zip(run(absmax), reference.quantize_absmax(absmax), strict=True):
        cases.check_equal(ours, expected, "quantize_absmax")
    return {"nf4": lambda: run(absmax)}, 9 * absmax.numel()


if __name__ == "__main__":
    measure.print_table("quantize_absmax", cases.COLUMNS, cases.rows(make))
