"""Multiply a few rows by a quantized weight: nf4, its kernel alone, others.

python bench/bench_matmul_small.py --model llama-3-8b
"""

import cases
import products

DEFAULTS = cases.Options(
    shapes=[(4096, 4096), (14336, 4096)] if cases.GPU else [(1024, 1024)],
    rows=[1, 2, 4, 8, 16] if cases.GPU else [1, 16],
)

if __name__ == "__main__":
    extra = products.kernel_alone("matmul_small")
    cases.main("linear, few rows", lambda options: products.make(options, extra), DEFAULTS)
