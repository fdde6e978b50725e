"""A QLoRA layer's forward, and its forward and backward: nf4 and others.

python bench/bench_qlora_step.py --help
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

import nf4
from nf4.bench.harness import cases, peers
from nf4.bench.harness.measure import Function
from nf4.error import exact
from nf4.tools.cost import weight_bytes

TITLE = "QLoRA layer"
DEFAULTS = cases.Options(shapes=[(2048, 2048)], rows=[1, 64, 256], dtypes=["bf16", "fp32"])
ON_GPU = cases.Options(
    shapes=[(4096, 4096), (14336, 4096)], rows=[1, 16, 256, 1024, 4096, 16384], ranks=[16, 64]
)
SCALING = 2.0
CHECKED = 64  # rows of x


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Run forward and backward; gradients of x and the adapter are left in .grad."""
    x.grad = None
    for p in layer.parameters():
        p.grad = None
    layer(x).backward(dy)


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases: a forward and a step for each size."""
    for weight in options.weights():
        n, k = weight.shape
        w = options.random(n, k, dtype=weight.dtype) / k**0.5
        q = nf4.quantize(w)
        for r in options.ranks:
            a, b = options.random(r, k) / k**0.5, options.random(n, r) / r**0.5
            layer = ours(w, a, b)
            both = {"nf4": layer, **peers.qlora_layers(w, q, a, b, SCALING)}
            for m in weight.rows:
                x = options.random(m, k, dtype=weight.dtype)
                right = check(layer, q, a, b, x)
                sizes = {**weight.labels, "r": str(r), "M": str(m)}
                yield forward({**sizes, "pass": "forward"}, both, x, weight, r, right)
                yield training({**sizes, "pass": "step"}, both, x, weight, r)


def ours(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> nf4.QLoRALinear:
    """Return our layer on w with an adapter."""
    dense = nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
    dense.weight = nn.Parameter(w, requires_grad=False)
    layer = nf4.QLoRALinear.from_linear(dense, r=a.shape[0], lora_alpha=SCALING * a.shape[0])
    with torch.no_grad():
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
    return layer


def check(
    layer: nn.Module, q: nf4.NF4Tensor, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Check our forward on the first rows; return those exact."""
    right = exact.LoraLinear(x[:CHECKED], q, a, b, SCALING).y
    with torch.no_grad():
        cases.check_right(layer(x[:CHECKED]), right, "lora_linear")
    return right.value


def forward(
    labels: dict[str, str],
    layers: dict[str, nn.Module],
    x: torch.Tensor,
    weight: cases.Weight,
    r: int,
    right: torch.Tensor,
) -> cases.Case:
    """Return the forward without gradients."""

    def run(layer: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            y: torch.Tensor = layer(x)
        return y

    m, (n, k) = x.shape[0], weight.shape
    functions: dict[str, Function] = {name: partial(run, f) for name, f in layers.items()}
    moved = weight_bytes(n, k) + x.itemsize * (m + r) * (k + n)
    flops = 2.0 * m * (n * k + r * (n + k))
    return cases.Case(labels, functions, moved, flops, weight.name, right)


def training(
    labels: dict[str, str],
    layers: dict[str, nn.Module],
    x: torch.Tensor,
    weight: cases.Weight,
    r: int,
) -> cases.Case:
    """Return forward and backward."""
    m, (n, k) = x.shape[0], weight.shape
    x = x.clone().requires_grad_()
    dy = torch.randn(m, n, dtype=x.dtype, device=x.device)
    functions: dict[str, Function] = {
        name: partial(step, layer, x, dy) for name, layer in layers.items()
    }
    moved = 2 * weight_bytes(n, k) + x.itemsize * m * (2 * n + 3 * k) + 8 * r * (n + k)
    flops = 2.0 * m * (2 * n * k + 3 * r * (n + k))
    return cases.Case(labels, functions, moved, flops, weight.name)


if __name__ == "__main__":
    from nf4.commands.cli import main

    sys.exit(main(["bench", "qlora_step", *sys.argv[1:]]))
