"""What the benchmarks of both products share: a layer's weight, the check, every peer."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

import nf4
from nf4.bench.harness import cases, peers
from nf4.bench.harness.measure import Function
from nf4.error import exact
from nf4.tensor import fits_fragments
from nf4.tools.cost import weight_bytes

CHECKED = 64  # rows of x


def make(options: cases.Options, op: str) -> Iterator[cases.Case]:
    """Yield a case for each weight and number of rows.

    Args:
        options: sizes.
        op: a kernel that is timed alone too, without the choice of one, where it can run.
    """
    for weight in options.weights():
        (n, k), dtype = weight.shape, weight.dtype
        w = options.random(n, k, dtype=dtype) / k**0.5
        q = nf4.quantize(w)
        ours = nf4.to_fragments(q) if w.is_cuda and fits_fragments(q.shape, q.block_size) else q
        others = peers.layers(w, q)
        for m in weight.rows:
            x = options.random(m, k, dtype=dtype)
            right = exact.linear(x[:CHECKED], q)
            functions: dict[str, Function] = {"nf4": partial(nf4.linear, x, ours)}
            functions |= kernel_alone(op, x, ours)
            for name, function in functions.items():
                cases.check_right(function()[:CHECKED], right, f"linear, {name}")
            functions |= {name: partial(f, x) for name, f in others.items()}
            moved = weight_bytes(n, k) + x.itemsize * m * (n + k)
            chosen = nf4.explain(x.shape, ours, dtype).kernel.rpartition(".")[2]
            labels = {**weight.labels, "M": str(m), "ours": chosen}
            flops = 2.0 * m * n * k
            yield cases.Case(labels, functions, moved, flops, weight.name, right.value)


def kernel_alone(op: str, x: Tensor, q: nf4.NF4Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return what times a kernel without the choice of one; nothing where it cannot run."""
    if q.layout != "fragments" or x.dtype.itemsize != 2:
        return {}
    if op in ("matmul_row", "matmul_small") and nf4.explain(x.shape, q, x.dtype).kernel != op:
        return {}
    weight, run = q.as_weight(), cases.kernel(op, x.device)
    return {f"nf4, {op} alone": lambda: run(x, weight)}
