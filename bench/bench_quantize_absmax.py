"""Double quantization of the scales alone, those of a weight in blocks of 64, and a copy.

python bench/bench_quantize_absmax.py --help
"""

from collections.abc import Iterator

import cases
import torch

from nf4.reference import quantize_absmax as reference

DEFAULTS = cases.Options(
    shapes=[(1024, 1024), (4096, 4096)] + [(28672, 8192)] * cases.GPU, dtypes=["fp32"]
)


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases; scales are float32 whatever the weight's dtype."""
    run = torch.ops.nf4.quantize_absmax
    for shape, _, labels in options.weights():
        absmax = torch.rand(shape[0] * shape[1] // 64, device=cases.DEVICE) + 0.5
        for ours, expected in zip(run(absmax), reference.quantize_absmax(absmax), strict=True):
            cases.check_equal(ours, expected, "quantize_absmax")
        moved = 9 * absmax.numel()  # read twice, for the mean comes first
        functions = {"nf4": lambda absmax=absmax: run(absmax), "copy": cases.copy_of(moved)}
        yield cases.Case(labels, functions, moved)


if __name__ == "__main__":
    cases.main("quantize_absmax", make, DEFAULTS)
