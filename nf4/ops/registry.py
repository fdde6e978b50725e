"""How operators of ``torch.ops.nf4`` are registered, called, and computed on a kind of device.

Registering them with ``torch.library`` makes them work under ``torch.compile(fullgraph=True)``,
autocast, checkpointing and on meta tensors. Where nothing faster is at hand an operator computes
what nf4/reference/ defines. nf4/ops/operators.py says which there are.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from nf4 import reference
from nf4.tensor import PLAIN
from nf4.tools import streams


def define(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    rows: bool = False,
    direct: Callable[..., Any] | None = None,
) -> None:
    """Register an operator ``nf4::name``.

    Args:
        name: by which `call` finds it.
        schema: arguments and results.
        compute: what it computes.
        fake: the results' shapes and dtypes alone.
        backward: its gradient.
        setup_context: what backward keeps.
        rows: whether the first argument may have any number of dimensions before its last.
        direct: what computes it past the dispatcher, where results may be None.
    """
    qualified = f"nf4::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd")(compute)
    torch.library.register_fake(qualified)(fake)
    eager, operator = None, getattr(torch.ops.nf4, name).default
    functional = operator
    if "()" not in schema:
        torch.library.register_vmap(qualified, partial(_batched, operator, rows))
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
        functional = _functional(operator, backward, setup_context)
    if backward is not None and setup_context is not None:
        eager = _eager(compute, backward, setup_context)
    _OPERATORS[name] = (direct or compute, eager, operator, functional)


def _eager(
    compute: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> Callable[..., Any]:
    """Return an operator with its gradient, without PyTorch's dispatcher."""

    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)  # of what is not differentiable, zeros would be made
        ctx.inputs = len(args)
        output = compute(*args)
        setup_context(ctx, args, output)
        return output

    def gradients(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> Any:
        return (None,) * ctx.inputs if grad is None else backward(ctx, grad, *others)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type("NF4", (torch.autograd.Function,), methods)
    # past what Function.apply does for torch.func, whose tensors never come here
    return cast(Callable[..., Any], super(torch.autograd.Function, function).apply)


def is_transformed() -> bool:
    """Return whether torch.func is at work, outside of torch.compile."""
    transformed: bool = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed and not torch.compiler.is_compiling()


def _no_forward_mode(ctx: Any, *tangents: Tensor | None) -> None:
    raise NotImplementedError("nf4: forward-mode differentiation is not implemented; use backward")


def _batched(
    operator: Callable[..., Any], rows: bool, info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """Compute an operator under ``torch.vmap``: all samples at once, or one after another.

    Args:
        operator: to be called on plain tensors.
        rows: whether the first argument may have any number of dimensions before its last.
        info: how many samples there are.
        in_dims: of each argument, the dimension of samples; something else where it has none.
        *args: the arguments.
    """
    batched = [i for i, dim in enumerate(in_dims) if isinstance(dim, int)]
    if rows and batched == [0]:
        return operator(args[0].movedim(in_dims[0], 0), *args[1:]), 0
    found = []
    for sample in range(info.batch_size or 1):
        if info.batch_size:
            own = {i: args[i].select(in_dims[i], sample) for i in batched}
        else:  # one of zeros, for the shapes of results
            shapes = {i: args[i].movedim(in_dims[i], 0).shape[1:] for i in batched}
            own = {i: args[i].new_zeros(shape) for i, shape in shapes.items()}
        found.append(operator(*(own.get(i, a) for i, a in enumerate(args))))
    count = info.batch_size
    if isinstance(found[0], Tensor):
        return torch.stack(found)[:count], 0
    stacked = tuple(torch.stack(parts)[:count] for parts in zip(*found, strict=True))
    return stacked, (0,) * len(stacked)


def _functional(
    operator: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """Return an operator with its gradient for torch.func's grad, vjp, jacrev and vmap.

    What ``torch.library.register_autograd`` makes of them torch.func refuses.
    """
    methods = {
        "forward": staticmethod(operator),
        "backward": staticmethod(backward),
        "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        "jvp": staticmethod(_no_forward_mode),
        "generate_vmap_rule": True,
    }
    function: Any = type("NF4", (torch.autograd.Function,), methods)
    return cast(Callable[..., Any], function.apply)


# name: what computes it, the same with a gradient if it has one, the operator itself, and the
# operator as torch.func takes it
_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None, Any, Any]] = {}


def call(name: str, *args: Any) -> Any:
    """Call an operator, past PyTorch's dispatcher where nobody asks for it.

    The dispatcher costs more than some kernels take, with gradients 150 us. It is needed for
    subclasses and modes (fake tensors, torch.compile, torch.func), while tracing, and to make
    views that are to be negated what they stand for.
    """
    compute, eager, operator, functional = _OPERATORS[name]
    compiling = torch.compiler.is_compiling()
    # `is_transformed` written out: a call less
    if not compiling and torch._C._functorch.peek_interpreter_stack() is not None:
        return functional(*args)
    if (
        compiling
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or args[0].is_meta  # all are on one device
    ):
        return operator(*args)
    grad, found = torch.is_grad_enabled(), False
    for a in args:
        kind = type(a)
        if kind in PLAIN:
            if a.is_neg():
                return operator(*args)
            found = found or (grad and a.requires_grad)
        elif kind not in _NO_TENSORS and isinstance(a, Tensor):
            return operator(*args)
    if found:
        return operator(*args) if eager is None else eager(*args)
    return compute(*args)


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
    if kind == "cuda" and device.index == streams.current_gpu():
        return function(*args)
    # Kernels are launched on the current device
    with torch.get_device_module(device).device(device):
        return function(*args)


def run_without_autocast(op: str, x: Tensor, *args: Any) -> Any:
    """Keep autocast out of an operator: its caller has chosen the dtypes already."""
    kind = x.device.type
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(kind):
        return run(op, x, x, *args)
    torch.set_autocast_enabled(kind, False)  # a context manager costs more than a launch
    try:
        return run(op, x, x, *args)
    finally:
        torch.set_autocast_enabled(kind, True)
