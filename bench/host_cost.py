"""What calls cost the host: microseconds of Python and PyTorch with kernels that do nothing.

The launch itself is taken out: `JITFunction.run` returns at once. The operators are made to take
the kernels' path on CPU tensors. And what comes once: importing nf4, and the first product.

python bench/host_cost.py
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import nf4
from nf4.bench.circumstances import circumstances
from nf4.bench.markdown import heading, table
from nf4.ops import registry
from nf4.tools.paths import write_file

FORMAT = "nf4-host-cost-1"
CALLS = 5000
# What PyTorch's own product costs the host, a small one in fp32, which no library is asked for
LINEAR = "torch.nn.functional.linear"
ONCE = """
import time
begin = time.perf_counter()
import torch
torch_ = time.perf_counter()
import nf4
imported = time.perf_counter()
device = "cuda" if torch.cuda.is_available() else "cpu"
q = nf4.quantize(torch.ones(128, 128, device=device))
x = torch.ones(1, 128, device=device)
ready = time.perf_counter()
nf4.linear(x, q)
first = time.perf_counter()
print(torch_ - begin, imported - torch_, ready - imported, first - ready)
"""


def microseconds(function: Callable[[], Any], calls: int = CALLS) -> float:
    """Return the least mean of ten series of calls."""
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        for _ in range(calls // 10):
            function()
        best = min(best, time.perf_counter() - begin)
    return 1e6 * best / (calls // 10)


def rows(calls: int = CALLS) -> dict[str, float]:
    """Return each call and its cost in microseconds; needs Triton."""
    timed = functions()
    with without_launches():
        return {name: microseconds(function, calls) for name, function in timed.items()}


def counts() -> dict[str, int]:
    """Return how many functions, of Python and built in, each call enters, once warm."""
    counted = functions()
    with without_launches():
        return {name: entered(function) for name, function in counted.items()}


def entered(function: Callable[[], Any]) -> int:
    """Return how many functions a call enters, itself not counted."""
    function()
    events: list[str] = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events) - 2  # function, and setprofile


@contextmanager
def without_launches() -> Iterator[None]:
    """Let operators on CPU tensors take the kernels' path, and launches return at once."""
    from triton.runtime.jit import JITFunction

    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: None),
        mock.patch.dict(registry._FASTER, {"cpu": registry._FASTER["cuda"]}),
        torch.no_grad(),
    ):
        registry.implementation.cache_clear()
        yield
    registry.implementation.cache_clear()


def functions() -> dict[str, Callable[[], Any]]:
    """Return the calls, small ones, by name."""
    w = torch.randn(128, 128, dtype=torch.bfloat16)
    x = torch.randn(1, 128, dtype=torch.bfloat16)
    q = nf4.quantize(w)
    f = nf4.to_fragments(q)
    a, b = torch.randn(16, 128), torch.randn(128, 16)
    out, wide = torch.empty_like(w), (x.float(), w.float())
    return {
        "torch.empty": lambda: torch.empty(128, 128),
        LINEAR: lambda: torch.nn.functional.linear(*wide),
        "nf4.quantize, no double quantization": lambda: nf4.quantize(
            w, double_quant=False, check=False
        ),
        "nf4.quantize": lambda: nf4.quantize(w, check=False),
        "nf4.dequantize": lambda: nf4.dequantize(q),
        "nf4.dequantize, out=": lambda: nf4.dequantize(q, out=out),
        "nf4.linear, M = 1": lambda: nf4.linear(x, f),
        "nf4.lora_linear, M = 1": lambda: nf4.lora_linear(x, f, a, b, 2.0),
    }


def once() -> dict[str, float]:
    """Return what comes once, in milliseconds: the least of three new processes."""
    names = ("import torch", "import nf4", "first nf4.quantize", "first nf4.linear, M = 1")
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", ONCE], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"expected a new process to multiply, it said: {done.stderr}")
        runs.append([1e3 * float(seconds) for seconds in done.stdout.split()])
    return dict(zip(names, map(min, *runs), strict=True))


def tables(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    calls = [[name, f"{cost:.1f}"] for name, cost in found["calls"].items()]
    once = [[name, f"{cost:.0f}"] for name, cost in found["once"].items()]
    lines = heading("What calls cost the host", found)
    lines += [*table(["call", "host µs"], calls), *table(["once", "ms"], once)]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description="Measure what calls cost the host.")
    parser.add_argument("--out", help="file for the results as JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "format": FORMAT,
        **circumstances(device),
        "calls": rows(),
        "once": once(),
    }
    print(tables(found), end="")  # noqa: T201  a benchmark's purpose is its table
    if options.out is not None:
        write_file(Path(options.out), json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
