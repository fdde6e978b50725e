"""How operators of ``torch.ops.nf4`` are registered, called, and computed on a kind of device.

Registering them with ``torch.library`` makes them work under ``torch.compile(fullgraph=True)``,
autocast, checkpointing and on meta tensors. Where nothing faster is at hand an operator computes
what nf4/reference/ defines. nf4/operators.py says which there are.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from nf4 import reference


def define(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Register an operator ``nf4::name``.

    Args:
        name: by which `call` finds it.
        schema: arguments and results.
        compute: what it computes.
        fake: the results' shapes and dtypes alone.
        backward: its gradient.
        setup_context: what backward keeps.
    """
    qualified = f"nf4::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd")(compute)
    torch.library.register_fake(qualified)(fake)
    eager = None
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    if backward is not None and setup_context is not None:
        eager = _eager(compute, backward, setup_context)
    _OPERATORS[name] = (compute, eager, getattr(torch.ops.nf4, name).default)


def _eager(
    compute: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> Callable[..., Any]:
    """Return an operator with its gradient, without PyTorch's dispatcher."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = compute(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type("NF4", (torch.autograd.Function,), methods)
    return cast(Callable[..., Any], function.apply)


# name: what computes it, the same with a gradient if it has one, and the operator itself
_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None, Any]] = {}


def call(name: str, *args: Any) -> Any:
    """Call an operator, past PyTorch's dispatcher where nobody asks for it.

    The dispatcher costs more than some kernels take, with gradients 150 us. It is needed for
    subclasses and modes (fake tensors, torch.compile, torch.func), while tracing, and to make
    views that are to be negated what they stand for.
    """
    compute, eager, operator = _OPERATORS[name]
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or args[0].is_meta  # all are on one device
    ):
        return operator(*args)
    grad, found = torch.is_grad_enabled(), False
    for a in args:
        kind = type(a)
        if kind in _PLAIN:
            if a.is_neg():
                return operator(*args)
            found = found or (grad and a.requires_grad)
        elif kind not in _NO_TENSORS and isinstance(a, Tensor):
            return operator(*args)
    if found:
        return operator(*args) if eager is None else eager(*args)
    return compute(*args)


_PLAIN = {Tensor, torch.nn.Parameter}
_NO_TENSORS = {type(None), bool, int, float, str, list, torch.Size, torch.dtype}


# What replaces references on a kind of device: packages, what they need, the files they have
_KERNELS = (
    (
        "nf4.kernels",
        "triton",
        ("quantize", "quantize_mse", "quantize_absmax", "dequantize", "repack"),
    ),
    ("nf4.gpu", "triton", ("linear", "lora_linear")),
)
_FASTER = {
    "cuda": _KERNELS,  # ROCm calls itself cuda too
    "xpu": _KERNELS[:1],
    "cpu": (
        (
            "nf4.cpu",
            "numba",
            ("quantize", "quantize_mse", "quantize_absmax", "dequantize", "linear", "lora_linear"),
        ),
    ),
}


@lru_cache
def implementation(op: str, device_type: str) -> Callable[..., Any]:
    """Return what computes an operator on a kind of device, the reference if nothing faster."""
    file, package = op.removesuffix("_backward"), reference.__name__
    for faster, needs, files in _FASTER.get(device_type, ()):
        if file in files and importlib.util.find_spec(needs) is not None:
            package = faster
    function: Callable[..., Any] = getattr(importlib.import_module(f"{package}.{file}"), op)
    return function


def run(op: str, like: Tensor, *args: Any) -> Any:
    """Compute an operator where a tensor is, whatever the current device is."""
    device = like.device
    kind = device.type
    function = implementation(op, kind)
    if kind == "cpu":
        return function(*args)
    module = torch.get_device_module(device)
    if device.index == module.current_device():
        return function(*args)
    with module.device(device):  # kernels are launched on the current device
        return function(*args)


def run_without_autocast(op: str, x: Tensor, *args: Any) -> Any:
    """Keep autocast out of an operator: its caller has chosen the dtypes already."""
    if not torch._C._is_any_autocast_enabled():
        return run(op, x, x, *args)
    with torch.autocast(x.device.type, enabled=False):
        return run(op, x, x, *args)
