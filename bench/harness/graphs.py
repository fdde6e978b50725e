"""Time kernels on a GPU by CUDA graphs: what they take on the device, with no host in the way.

A graph holds a call for each of several weights, more bytes than the cache has, so that every call
reads memory; its median time over the calls is a row. Products come in the numbers of rows that
decide between kernels, with what the plan chooses beside dense products, dequantize and the
library, and bitsandbytes if it is installed. The file is written after every case.

python bench/harness/graphs.py --out bench/results/kernels-h200.json --limit 60
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

import nf4
from nf4.bench.harness import peers
from nf4.bench.harness.circumstances import circumstances
from nf4.bench.harness.markdown import heading, table
from nf4.tools.cost import device_of, linear_limit_seconds, weight_bytes
from nf4.tools.paths import write_file
from nf4.tools.shapes import parse_shape
from nf4.tools.terms import LowRank

FORMAT = "nf4-graphs-1"
SHAPES = ("4096x4096", "14336x4096", "4096x14336", "1024x4096", "28672x8192")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
RANKS = (16, 64)
SHAPES_IN_GUIDE = ("4096×4096", "14336×4096")
ROWS_IN_GUIDE = (", M = 1", ", M = 16", ", M = 64", ", M = 4096")
COLD_BYTES = 4e8  # of what a graph reads, several times any cache
REPEATS = 7


@dataclass(frozen=True)
class Case:
    """What is timed, one function for each weight.

    Attributes:
        operator: such as "linear".
        size: of W and x.
        limit: the least seconds by nf4/tools/cost.py.
        functions: by name, each with one call for each of the weights.
    """

    operator: str
    size: str
    limit: float
    functions: dict[str, list[Callable[[], Any]]]


def seconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Return the median time of a call: in a CUDA graph, or on a CPU by the clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e-3 * float(begin.elapsed_time(end)) / len(calls))
    return statistics.median(times)


def cases(shapes: Sequence[tuple[int, int]], device: torch.device) -> Iterator[Case]:
    """Yield what is timed, the most important first."""
    for n, k in shapes:
        w = torch.randn(n, k, dtype=torch.bfloat16, device=device) / k**0.5
        count = max(2, min(64, int(COLD_BYTES / weight_bytes(n, k))))
        if device.type != "cuda":
            count = 1
        rows = [_copy(nf4.quantize(w)) for _ in range(count)]
        weights = [nf4.to_fragments(q) for q in rows]
        dense = [w.clone() for _ in range(max(1, count // 4))]
        yield from _products(weights, dense, device)
        yield from _dense_writes(rows, weights, device)


def _copy(q: nf4.NF4Tensor) -> nf4.NF4Tensor:
    return q.with_parts([None if part is None else part.clone() for part in q.parts()])


def _products(
    weights: Sequence[nf4.NF4Tensor], dense: Sequence[Tensor], device: torch.device
) -> Iterator[Case]:
    (n, k), model = weights[0].shape, device_of(device)
    out = torch.empty(n, k, dtype=torch.bfloat16, device=device)
    others: list[Callable[[Tensor], Tensor]] = []
    if peers.has("bitsandbytes"):
        found = [peers.layers(w, weights[0]) for w in dense[:4]]
        others = [layers["bitsandbytes"] for layers in found if "bitsandbytes" in layers]
    for m in ROWS:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
        used = weights if m <= 64 else weights[:6]
        chosen = nf4.explain(x.shape, weights[0], x.dtype).kernel.rpartition(".")[2]

        def by_library(q: nf4.NF4Tensor, x: Tensor = x) -> Tensor:
            return dense_linear(x, nf4.dequantize(q, out=out))

        functions: dict[str, list[Callable[[], Any]]] = {
            f"nf4, {chosen}": [partial(nf4.linear, x, q) for q in used],
            "dequantize, then the library": [partial(by_library, q) for q in used],
            "dense bf16": [partial(dense_linear, x, w) for w in dense],
        }
        if others:
            functions["bitsandbytes"] = [partial(f, x) for f in others]
        yield Case("linear", f"{n}×{k}, M = {m}", linear_limit_seconds(model, m, n, k), functions)


def _dense_writes(
    rows: Sequence[nf4.NF4Tensor], weights: Sequence[nf4.NF4Tensor], device: torch.device
) -> Iterator[Case]:
    from nf4.kernels.dequantize_merge import dequantize_merge as merge

    n, k = weights[0].shape
    moved = weight_bytes(n, k) + 2 * n * k
    limit = moved / device_of(device).bandwidth
    outs = [torch.empty(n, k, dtype=torch.bfloat16, device=device) for _ in range(2)]
    pairs = list(zip(weights, outs * len(weights), strict=False))
    from_rows = list(zip(rows, outs * len(rows), strict=False))
    functions: dict[str, list[Callable[[], Any]]] = {
        "nf4, rows": [partial(nf4.dequantize, q, out=o) for q, o in from_rows],
        "nf4, fragments": [partial(nf4.dequantize, q, out=o) for q, o in pairs],
    }
    yield Case("dequantize", f"{n}×{k}", limit, functions)
    if device.type != "cuda":
        return  # whose kernel it is
    for r in RANKS:
        a = torch.randn(r, k, device=device) / k**0.5
        b = torch.randn(n, r, device=device)
        merged: dict[str, list[Callable[[], Any]]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            low = LowRank(a.to(dtype), b.to(dtype), 2.0)
            name = f"nf4, A and B in {str(dtype).removeprefix('torch.')}"
            merged[name] = [partial(merge, q.as_weight(), low, o.dtype, o) for q, o in pairs]
        yield Case("dequantize_merge", f"{n}×{k}, r = {r}", limit, merged)


def measure(shapes: Sequence[tuple[int, int]], limit: float, path: Path | None) -> dict[str, Any]:
    """Time all cases, or as many as fit a limit of seconds, and write each as it is done."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.monotonic()
    found = {"format": FORMAT, **circumstances(device), "rows": [], "left_out": 0}
    with torch.no_grad():
        for case in cases(shapes, device):
            if time.monotonic() - begin > limit:
                found["left_out"] += 1
                continue
            for name, calls in case.functions.items():
                took = 1e6 * seconds(calls, device)
                row = [case.operator, case.size, name, took, 1e6 * case.limit]
                found["rows"].append(row)
            if path is not None:
                write_file(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown: a row a case, a column a contender."""
    lines = heading("Kernels, by CUDA graphs over rotating weights", found)
    sizes: dict[tuple[str, str], list[str]] = {}
    for operator, size, name, took, limit in found["rows"]:
        key = (operator, size)
        sizes.setdefault(key, [operator, size, f"{limit:.1f}", ""])
        sizes[key][3] += f"{'; ' if sizes[key][3] else ''}{name} {took:.1f}"
    return "\n".join(
        [*lines, *table(["operator", "size", "limit, µs", "µs"], list(sizes.values()))]
    )


def summary(found: dict[str, Any]) -> list[str]:
    """Return lines of Markdown for the guide to benchmarks: what products take, and others."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for operator, size, name, took, limit in found["rows"]:
        row = cells.setdefault((operator, size), {"limit": f"{limit:.1f}"})
        row.setdefault("nf4" if name.startswith("nf4") else name, f"{took:.1f}")
    columns = ("nf4", "bitsandbytes", "dense bf16", "limit")
    wanted = [f"{shape}{rows}" for shape in SHAPES_IN_GUIDE for rows in ROWS_IN_GUIDE]
    lines = [
        [f"linear, {size}", *(cells["linear", size].get(c, "") for c in columns)]
        for size in wanted
        if ("linear", size) in cells
    ]
    return [f"{found['device']}:", "", *table(["bf16, µs on the GPU", *columns], lines)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description="Time kernels by CUDA graphs.")
    parser.add_argument("--out", help="file for the results as JSON, written after every case")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="of W, such as 4096x4096")
    parser.add_argument("--limit", type=float, default=600, help="seconds, default 600")
    options = parser.parse_args(arguments)
    try:
        shapes = [parse_shape(text) for text in options.shapes]
    except ValueError as error:
        sys.stderr.write(f"graphs: {error}\n")
        return 2
    path = None if options.out is None else Path(options.out)
    sys.stdout.write(tables(measure(shapes, options.limit, path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
