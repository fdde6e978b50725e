"""What a call costs the host, with kernels that do nothing: microseconds of Python and PyTorch.

The launch itself is taken out: `JITFunction.run` returns at once. The operators are made to take
the kernels' path on CPU tensors.

python bench/host_cost.py
"""

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

import nf4
from nf4 import operators

CALLS = 5000


def microseconds(function: Callable[[], Any], calls: int = CALLS) -> float:
    """Return the least mean of three series of calls."""
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, time.perf_counter() - begin)
    return 1e6 * best / calls


def rows(calls: int = CALLS) -> list[tuple[str, float]]:
    """Return each call and its cost."""
    w = torch.randn(128, 128, dtype=torch.bfloat16)
    x = torch.randn(1, 128, dtype=torch.bfloat16)
    q = nf4.quantize(w)
    f = nf4.to_fragments(q)
    a, b = torch.randn(16, 128), torch.randn(128, 16)
    out = torch.empty_like(w)
    functions: dict[str, Callable[[], Any]] = {
        "torch.empty": lambda: torch.empty(128, 128),
        "torch.nn.functional.linear": lambda: torch.nn.functional.linear(x, w),
        "nf4.quantize, no double quantization": lambda: nf4.quantize(
            w, double_quant=False, check=False
        ),
        "nf4.quantize": lambda: nf4.quantize(w, check=False),
        "nf4.dequantize": lambda: nf4.dequantize(q),
        "nf4.dequantize, out=": lambda: nf4.dequantize(q, out=out),
        "nf4.linear, M = 1": lambda: nf4.linear(x, f),
        "nf4.lora_linear, M = 1": lambda: nf4.lora_linear(x, f, a, b, 2.0),
    }
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: None),
        mock.patch.dict(operators._FASTER, {"cpu": operators._FASTER["cuda"]}),
        torch.no_grad(),
    ):
        operators.implementation.cache_clear()
        found = [(name, microseconds(function, calls)) for name, function in functions.items()]
    operators.implementation.cache_clear()
    return found


if __name__ == "__main__":
    lines = ["| call | host µs |", "|---|---|"]
    lines += [f"| {name} | {cost:.1f} |" for name, cost in rows()]
    print("\n".join(lines))  # noqa: T201  a benchmark's purpose is its table
