"""Dequantize a weight in fragments and add s * B @ A, in one launch and as others would.

python bench/bench_dequantize_merge.py --help
"""

from collections.abc import Iterator

import cases
import torch

import nf4

DEFAULTS = cases.Options(
    shapes=[(1024, 1024)] + [(4096, 4096), (14336, 4096)] * cases.GPU, ranks=[16, 64]
)


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases, one a rank."""
    merge = cases.kernel("dequantize_merge")
    for (n, k), dtype, labels in options.weights():
        w = torch.randn(n, k, dtype=dtype, device=cases.DEVICE)
        q = nf4.to_fragments(nf4.quantize(w))
        for r in options.ranks:
            a, b = (torch.randn(s, device=cases.DEVICE) / 8 for s in ((r, k), (n, r)))
            parts = (*q.parts(), a, b, 2.0, q.block_size, dtype)

            def unfused(q=q, a=a, b=b, dtype=dtype) -> torch.Tensor:
                w = nf4.dequantize(q, dtype)
                return w.addmm_(b.to(dtype), a.to(dtype), alpha=2.0)

            def fused(parts=parts) -> torch.Tensor:
                return merge(*parts)

            wide = nf4.dequantize(q, torch.float64)
            exact = wide + 2.0 * b.to(dtype).double() @ a.to(dtype).double()
            cases.check_close(fused(), exact, unfused(), "dequantize_merge")
            moved = q.nbytes + w.nbytes + a.nbytes + b.nbytes
            functions = {
                "nf4": fused,
                "dequantize, then addmm_": unfused,
                "dequantize alone": lambda q=q, dtype=dtype: nf4.dequantize(q, dtype),
                "copy": cases.copy_of(moved),
            }
            yield cases.Case({**labels, "r": str(r)}, functions, moved, 2.0 * n * k * r)


if __name__ == "__main__":
    cases.main("dequantize_merge" + cases.STAND_IN, make, DEFAULTS)
