"""What calls cost the host: microseconds of Python and PyTorch, and what they do in that time.

Without a GPU one is pretended (pretended.py): kernels are compiled and launched, and only the
driver's own call is missing. On a GPU the driver's call counts too. Beside them what each call
does: launches, PyTorch's operators, allocations; a step of training for each layer of a stack; and
what comes once: importing nf4, and the first product.

python bench/harness/host_cost.py
"""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nf4
from nf4.bench.harness import pretended
from nf4.bench.harness.circumstances import circumstances
from nf4.bench.harness.markdown import heading, table
from nf4.gpu.plan import always
from nf4.tools.paths import write_file

FORMAT = "nf4-host-cost-2"
CALLS = 5000
LAYERS = 16  # of a stack, so that what a step costs beside them is shared
# What PyTorch's own product costs the host, a small one in fp32, which no library is asked for
LINEAR = "torch.nn.functional.linear"
MANY = "M = 2048"  # rows
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
    """Return calls and their cost in microseconds; needs Triton."""
    timed = functions()
    if not torch.cuda.is_available():  # where a CPU would compute the library's product
        timed = {name: function for name, function in timed.items() if MANY not in name}
    with _gpu(), torch.no_grad():
        return {name: microseconds(function, calls) for name, function in timed.items()}


def counts() -> dict[str, int]:
    """Return how many functions, of Python and built in, each call enters, once warm."""
    counted = functions()
    with pretended.pretended_gpu(), torch.no_grad():
        for function in counted.values():
            function()
            function()  # the first may have prepared its launches
        return {name: pretended.entered(function) for name, function in counted.items()}


def does() -> dict[str, pretended.Counts]:
    """Return what each call does, and each layer of a stack in a step of training."""
    counted, stepped = functions(), steps(1)  # made before: what a pretended GPU computes is noise
    with pretended.pretended_gpu() as driver:
        with torch.no_grad():
            found = {name: pretended.counts(f, driver) for name, f in counted.items()}
        with always("dequantize"):
            for name, step in stepped.items():
                found[name] = pretended.counts(step, driver)
    return found


def layers(calls: int = CALLS // 20) -> dict[str, float]:
    """Return microseconds of a layer's forward and backward, of stacks of `LAYERS`."""
    timed = steps(LAYERS)
    with _gpu(), always("dequantize"):
        return {name: microseconds(step, calls) / LAYERS for name, step in timed.items()}


def _gpu() -> AbstractContextManager[Any]:
    """Return what lets calls take a GPU's way: nothing, where there is one."""
    return nullcontext() if torch.cuda.is_available() else pretended.pretended_gpu()


def functions() -> dict[str, Callable[[], Any]]:
    """Return the calls, small ones, by name."""
    device = _device()
    w = torch.randn(256, 256, dtype=torch.bfloat16, device=device)
    x = torch.randn(16, 256, dtype=torch.bfloat16, device=device)
    row, many = x[:1].clone(), x.repeat(128, 1)
    q = nf4.quantize(w)
    f = nf4.to_fragments(q)
    frozen = nf4.LinearNF4.from_weight(f)
    adapted = nf4.QLoRALinear.from_weight(f, r=16)
    for layer in (frozen, adapted):
        layer.to_fragments()
    a, b = torch.randn(16, 256, device=device), torch.randn(256, 16, device=device)
    # fp32 on a CPU: no library is asked for so small a product
    wide = (x, w) if device == "cuda" else (row.float(), w.float())
    out = torch.empty_like(w)
    return {
        "torch.empty": lambda: torch.empty(256, 256, device=device),
        LINEAR: lambda: torch.nn.functional.linear(*wide),
        "nf4.quantize, no double quantization": lambda: nf4.quantize(
            w, double_quant=False, check=False
        ),
        "nf4.quantize": lambda: nf4.quantize(w, check=False),
        "nf4.dequantize": lambda: nf4.dequantize(q),
        "nf4.dequantize, out=": lambda: nf4.dequantize(q, out=out),
        "nf4.linear, M = 1": lambda: nf4.linear(row, f),
        "nf4.linear, M = 16": lambda: nf4.linear(x, f),
        f"nf4.linear, {MANY}": lambda: nf4.linear(many, f),
        "nf4.lora_linear, M = 1": lambda: nf4.lora_linear(row, f, a, b, 2.0),
        "nf4.lora_linear, M = 16": lambda: nf4.lora_linear(x, f, a, b, 2.0),
        f"nf4.lora_linear, {MANY}": lambda: nf4.lora_linear(many, f, a, b, 2.0),
        "LinearNF4, M = 1": lambda: frozen(row),
        "QLoRALinear, M = 1": lambda: adapted(row),
    }


def steps(count: int) -> dict[str, Callable[[], None]]:
    """Return a step of training for stacks of layers under autocast, by name."""
    found = {"QLoRALinear, a step": _step(_stack("nf4", count))}
    if importlib.util.find_spec("peft") is not None:
        found["PEFT on LinearNF4, a step"] = _step(_stack("nf4 and PEFT", count))
        found["PEFT on torch.nn.Linear, a step"] = _step(_stack("PEFT", count))
        if importlib.util.find_spec("bitsandbytes") is not None:
            found["PEFT on bitsandbytes, a step"] = _step(_stack("bitsandbytes and PEFT", count))
    return found


def _stack(kind: str, count: int) -> nn.Module:
    """Return layers with adapters of rank 16, small and equal."""
    made: list[nn.Module] = []
    for _ in range(count):
        dense = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16, device=_device())
        dense.requires_grad_(False)
        layer: nn.Module = dense
        if kind == "nf4":
            layer = nf4.QLoRALinear.from_linear(dense, r=16).to_fragments()
        elif kind == "nf4 and PEFT":
            layer = nf4.LinearNF4.from_linear(dense).to_fragments()
        elif kind == "bitsandbytes and PEFT":
            layer = _of_bitsandbytes(dense)
        made.append(layer)
    stack = nn.Sequential(*made)
    if "PEFT" in kind:
        from peft import LoraConfig, inject_adapter_in_model

        importlib.import_module("nf4.integrations.peft")  # makes PEFT know the layers
        names = [str(i) for i in range(count)]
        inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=names), stack)
    return stack.train()


def _of_bitsandbytes(dense: nn.Linear) -> nn.Module:
    """Return bitsandbytes' layer; on a CPU it computes, where ours only pretend to."""
    import bitsandbytes

    layer: Any = bitsandbytes.nn.Linear4bit(
        64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        dense.weight.detach().cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    moved: nn.Module = layer.to(_device())
    return moved


def _step(stack: nn.Module) -> Callable[[], None]:
    device = _device()
    x, dy = (torch.randn(64, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    leaves = [x.requires_grad_(), *[p for p in stack.parameters() if p.requires_grad]]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(device, torch.bfloat16):
            y = stack(x)
        y.backward(dy)

    return step


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    cost = {name: None for name in found["does"]} | found["calls"] | found["layers"]
    names = ("launches", "operators", "allocations", "frames")
    calls = [
        [
            name,
            "" if us is None else f"{us:.1f}",
            *(str(found["does"][name].get(what, "")) for what in names),
        ]
        for name, us in cost.items()
    ]
    once = [[name, f"{ms:.0f}"] for name, ms in found["once"].items()]
    lines = heading("What calls cost the host", found)
    lines += table(["call, or a layer's step", "host µs", *names], calls)
    return "\n".join([*lines, *table(["once", "ms"], once)])


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
        "layers": layers(),
        "does": {name: asdict(one) for name, one in does().items()},
        "once": once(),
    }
    print(tables(found), end="")  # noqa: T201  a benchmark's purpose is its table
    if options.out is not None:
        write_file(Path(options.out), json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
