"""A QLoRA layer's forward, and its forward and backward: nf4 and others.

python bench/bench_qlora_step.py --model llama-3-8b --ranks 16 64
"""

from collections.abc import Iterator

import cases
import peers
import torch
from torch import nn

import nf4
from nf4.cost import weight_bytes

DEFAULTS = cases.Options(
    shapes=[(4096, 4096), (14336, 4096)] if cases.GPU else [(512, 512)],
    rows=[1, 16, 256, 1024, 4096, 16384] if cases.GPU else [64],
    ranks=[16, 64] if cases.GPU else [16],
)
SCALING = 2.0


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Run forward and backward; gradients of x and the adapter are left in .grad."""
    x.grad = None
    for p in layer.parameters():
        p.grad = None
    layer(x).backward(dy)


def make(options: cases.Options) -> Iterator[cases.Case]:
    """Yield the cases: a forward and a step for each size."""
    for (n, k), dtype, labels in options.weights():
        w = torch.randn(n, k, dtype=dtype, device=cases.DEVICE) / k**0.5
        q = nf4.quantize(w)
        for r in options.ranks:
            a = torch.randn(r, k, device=cases.DEVICE) / k**0.5
            b = torch.randn(n, r, device=cases.DEVICE) / r**0.5
            layer = ours(w, a, b)
            others = peers.qlora_layers(w, q, a, b, SCALING)
            for m in options.rows:
                x = torch.randn(m, k, dtype=dtype, device=cases.DEVICE)
                check(layer, q, a, b, x)
                sizes = {**labels, "r": str(r), "M": str(m)}
                both = {"nf4": layer, **others}
                yield forward(sizes, both, x, n, k, r)
                yield training(sizes, both, x, n, k, r)


def ours(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> nf4.QLoRALinear:
    """Return our layer on w with an adapter."""
    dense = nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
    dense.weight = nn.Parameter(w, requires_grad=False)
    layer = nf4.QLoRALinear.from_linear(dense, r=a.shape[0], lora_alpha=SCALING * a.shape[0])
    with torch.no_grad():
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
    return layer


def check(layer: nn.Module, q: nf4.NF4Tensor, a, b, x: torch.Tensor) -> None:
    """Hold our forward to the error of the unfused path, on the first rows."""
    x = x[:64]
    exact = x.double() @ nf4.dequantize(q, torch.float64).T
    exact += SCALING * (x.double() @ a.to(x.dtype).double().T) @ b.to(x.dtype).double().T
    dense = nf4.dequantize(q, x.dtype)
    peer = peers.Adapted(lambda x: x @ dense.T, a, b, SCALING)
    with torch.no_grad():
        cases.check_close(layer(x), exact, peer(x), "lora_linear")


def forward(labels, layers, x: torch.Tensor, n: int, k: int, r: int) -> cases.Case:
    """Return the forward without gradients."""

    def run(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    m = x.shape[0]
    functions = {name: lambda layer=layer: run(layer) for name, layer in layers.items()}
    moved = weight_bytes(n, k) + 2 * (m + r) * (k + n)
    flops = 2.0 * m * (n * k + r * (n + k))
    return cases.Case({**labels, "pass": "forward"}, functions, moved, flops)


def training(labels, layers, x: torch.Tensor, n: int, k: int, r: int) -> cases.Case:
    """Return forward and backward."""
    m = x.shape[0]
    x = x.clone().requires_grad_()
    dy = torch.randn(m, n, dtype=x.dtype, device=x.device)
    functions = {name: lambda layer=layer: step(layer, x, dy) for name, layer in layers.items()}
    moved = 2 * weight_bytes(n, k) + 4 * m * n + 6 * m * k + 8 * r * (n + k)
    flops = 2.0 * m * (2 * n * k + 3 * r * (n + k))
    return cases.Case({**labels, "pass": "step"}, functions, moved, flops)


if __name__ == "__main__":
    cases.main("QLoRA layer", make, DEFAULTS)
