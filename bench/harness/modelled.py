"""What a model of an H200 expects of the kernels and of their peers. Nothing here is measured.

A launch takes its bytes over the bandwidth of a copy, its flops over the throughput of a large
product, or its instructions over what the multiprocessors issue, whichever is most. The products
are modelled as nf4.explain does. Instructions come from the compiled kernels.

python bench/harness/modelled.py > bench/results/modelled-h200.md
"""

from collections.abc import Iterator

import torch
import triton

from nf4.bench.harness.markdown import table
from nf4.gpu.plan import Asked, chosen
from nf4.kernels import _aot, _report
from nf4.tools import cost

H200 = cost.DEVICES[0]
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]
ROWS = [4**i for i in range(8)]
ISSUED = 128  # instructions of single threads a multiprocessor issues a cycle


def launch(moved: float, flops: float = 0.0, instructions: float = 0.0) -> float:
    """Return the microseconds of a launch."""
    issue = instructions / (ISSUED * H200.sms * H200.clock)
    return 1e6 * max(moved / H200.bandwidth, flops / H200.flops, issue)


def instructions(name: str) -> float:
    """Return the instructions per weight of a compiled variant on sm_90."""
    variant = next(v for v in _report.variants() if v.name == name)
    found = _aot.report(variant, "sm_90").instructions
    assert found is not None
    return found


def quantizers() -> Iterator[list[str]]:
    """Yield rows of the table of quantize and dequantize, bf16, double quantization."""
    counts = {
        name: instructions(f"{variant}, bf16")
        for name, variant in (
            ("quantize", "quantize, block 64"),
            ("dequantize", "dequantize, block 64"),
            ("dequantize, fragments", "dequantize, fragments"),
        )
    }
    for n, k in SHAPES:
        moved = cost.weight_bytes(n, k) + 2 * n * k
        for name, count in counts.items():
            time = launch(moved, 0.0, count * n * k)
            yield [f"{n}×{k}", name, f"{count:.1f}", f"{time:.1f}", f"{launch(moved) / time:.0%}"]


def products() -> Iterator[list[str]]:
    """Yield rows of the table of nf4.linear on a weight in fragments."""
    cpu = torch.device("cpu")  # stands for an H200
    for n, k in SHAPES:
        for m in ROWS:
            form = (torch.bfloat16, "fragments", 64, True, cpu)
            choice = chosen(Asked("linear", m, (n, k), *form))
            ours = 1e6 * (choice.seconds or 0.0)
            dense = 1e6 * cost.gemm_seconds(H200, m, n, k)
            library = dense + 1e6 * cost.dequantize_seconds(H200, n, k)
            limit = 1e6 * cost.linear_limit_seconds(H200, m, n, k)
            times = [f"{t:.1f}" for t in (limit, ours, dense, library)]
            yield [f"{n}×{k}", str(m), choice.how, *times, f"{limit / ours:.0%}"]


def steps() -> Iterator[list[str]]:
    """Yield rows of the table of a QLoRA layer's forward and backward, many rows, no dropout."""
    merge_counts = {r: instructions(f"dequantize_merge, bf16, rank {r}") for r in (16, 64)}
    for n, k in SHAPES[:3]:
        for r in (16, 64):
            for m in (2048, 4096, 16384):
                weight = cost.weight_bytes(n, k) + 2 * n * k
                gemm = launch(2 * (m * k + n * k + m * n), 2 * m * n * k)
                merge = launch(weight + 4 * r * (n + k), 2 * n * k * r, merge_counts[r] * n * k)
                x_pass = launch(2 * m * k + 2 * m * r + 4 * r * k, 2 * m * k * r)
                dy_pass = launch(2 * m * n + 4 * m * r + 8 * n * r, 4 * m * n * r)
                dy_b = launch(2 * m * n + 2 * m * r + 2 * n * r, 2 * m * n * r)
                plain = launch(weight)
                forward = x_pass + merge + gemm
                backward = dy_pass + x_pass + merge + gemm
                # The hand-written sequence of bench/harness/peers.py: addmm reads and writes sums
                peer = plain + gemm + x_pass + launch(4 * m * n + 2 * m * r, 2 * m * n * r)
                peer += plain + gemm + 3 * dy_b + 2 * x_pass
                peer += launch(4 * m * k + 2 * m * r, 2 * m * k * r)
                limits = (
                    1e6 * cost.linear_limit_seconds(H200, m, n, k, r),
                    1e6 * cost.backward_limit_seconds(H200, m, n, k, r),
                )
                yield [
                    f"{n}×{k}",
                    str(r),
                    str(m),
                    f"{limits[0]:.0f}",
                    f"{forward:.0f} ({forward / limits[0] - 1:+.0%})",
                    f"{limits[1]:.0f}",
                    f"{backward:.0f} ({backward / limits[1] - 1:+.0%})",
                    f"{peer:.0f}",
                    f"{peer / (forward + backward):.2f}",
                ]


def report() -> str:
    """Return the whole page."""
    return "\n".join(
        [
            "# Modelled for an H200, not measured",
            "",
            "No GPU was available when this was written by `python bench/harness/modelled.py`.",
            f"Of an H200: {H200.bandwidth / 1e12} TB/s, {H200.flops / 1e12:.0f} TFLOP/s of bf16,",
            f"{H200.sms} multiprocessors at {H200.clock / 1e9} GHz; every launch at full bandwidth",
            "or throughput; the product kernels at 85 % of what their busiest unit could do.",
            f"Instructions as compiled by Triton {triton.__version__} for sm_90.",
            "",
            "## Quantize and dequantize, bf16, double quantization",
            "",
            *table(["W", "op", "instructions / weight", "µs", "of the copy"], quantizers()),
            "## Linear, bf16, W in fragments",
            "",
            *table(
                ["W", "M", "kernel", "limit µs", "ours µs", "dense bf16 µs"]
                + ["dequantize + dense µs", "of the limit"],
                products(),
            ),
            "## QLoRA layer, bf16, no dropout",
            "",
            "Last: the hand-written sequence of bench/harness/peers.py, forward and backward.",
            "",
            *table(
                ["W", "r", "M", "forward limit µs", "ours", "backward limit µs", "ours"]
                + ["sequence µs", "sequence / ours"],
                steps(),
            ),
        ]
    )


if __name__ == "__main__":
    print(report(), end="")  # noqa: T201  a benchmark's purpose is its table
