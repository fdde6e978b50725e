"""Multiply by a quantized weight, from one row to a training batch: nf4, its kernel alone, others.

python bench/bench_matmul.py --model llama-3-8b
"""

import cases
import products

DEFAULTS = cases.Options(
    shapes=[(4096, 4096), (14336, 4096)] if cases.GPU else [(1024, 1024)],
    rows=[4**i for i in range(8)] if cases.GPU else [16, 64],
)

if __name__ == "__main__":
    extra = products.kernel_alone("matmul")
    cases.main("linear", lambda options: products.make(options, extra), DEFAULTS)
