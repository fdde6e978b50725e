"""What the benchmarks of both products share: a layer's weight, the check, every peer."""

from collections.abc import Callable, Iterator

import cases
import peers
import torch
from torch import Tensor

import nf4
from nf4.cost import weight_bytes
from nf4.tensor import fits_fragments


def make(
    options: cases.Options,
    extra: Callable[[Tensor, nf4.NF4Tensor], dict[str, cases.measure.Function]],
) -> Iterator[cases.Case]:
    """Yield a case for each weight and number of rows.

    Args:
        options: sizes.
        extra: returns further functions to time, by name, for an input and the weight.
    """
    for (n, k), dtype, labels in options.weights():
        w = torch.randn(n, k, dtype=dtype, device=cases.DEVICE) / k**0.5
        q = nf4.quantize(w)
        ours = nf4.to_fragments(q) if cases.GPU and fits_fragments(q.shape, q.block_size) else q
        others = peers.layers(w, q)
        wide = nf4.dequantize(q, torch.float64)
        for m in options.rows:
            x = torch.randn(m, k, dtype=dtype, device=cases.DEVICE)
            few = slice(0, 64)  # rows that are checked
            peer = x[few] @ nf4.dequantize(q, dtype).T
            exact = x[few].double() @ wide.T
            cases.check_close(nf4.linear(x, ours)[few], exact, peer, "linear")
            functions = {"nf4": lambda x=x, ours=ours: nf4.linear(x, ours)}
            functions |= extra(x, ours)
            functions |= {name: lambda f=f, x=x: f(x) for name, f in others.items()}
            moved = weight_bytes(n, k) + x.itemsize * m * (n + k)
            chosen = nf4.explain(x.shape, ours, dtype).kernel.rpartition(".")[2]
            yield cases.Case(
                {**labels, "M": str(m), "ours": chosen}, functions, moved, 2.0 * m * n * k
            )


def kernel_alone(op: str) -> Callable[[Tensor, nf4.NF4Tensor], dict[str, cases.measure.Function]]:
    """Return what times a kernel without the choice of one, where it can run."""

    def extra(x: Tensor, q: nf4.NF4Tensor) -> dict[str, cases.measure.Function]:
        if q.layout != "fragments":
            return {}
        n = q.shape[0]
        weight = q.parts()
        run = cases.kernel(op)
        return {op: lambda: run(x, *weight, None, None, None, 1.0, n, q.block_size)}

    return extra
