"""How operators of ``torch.ops.nf4`` are registered, called, and computed on a kind of device.

Registering them with ``torch.library`` makes them work under ``torch.compile(fullgraph=True)``,
autocast, checkpointing and on meta tensors. Where nothing faster is at hand an operator computes
what nf4/reference/ defines. Each is a file beside this one, imported by nf4/functional.py.
"""

import importlib
import importlib.util
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nf4 import reference
from nf4.tensor import PLAIN
from nf4.tools import streams
from nf4.tools.caches import forgettable

Grads = dict[str, Tensor | None]  # of arguments, by their names


@dataclass(frozen=True)
class Gradient:
    """The gradient of an operator.

    Attributes:
        backward: takes a context, which arguments need a gradient, and the gradients of all
            results; returns the gradients of arguments by their names, those that have one.
        keep: takes a context, which arguments need a gradient, the arguments and the result, and
            lets the context keep what backward wants of them; None if it wants nothing.
    """

    backward: Callable[..., Grads]
    keep: Callable[..., None] | None = None


class Operator(NamedTuple):
    """An operator, as it is called with its arguments one by one.

    Attributes:
        short: computes past PyTorch's dispatcher.
        eager: the same with a gradient; None if it has none.
        overload: PyTorch's.
        functional: as torch.func takes it.
    """

    short: Callable[..., Any]
    eager: Callable[..., Any] | None
    overload: Any
    functional: Callable[..., Any]


_OPERATORS: dict[str, Operator] = {}


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    pack: Callable[..., tuple[Any, ...]] | None = None,
    compute: Callable[..., Any] | None = None,
    gradient: Gradient | None = None,
    rows: bool = False,
) -> None:
    """Register an operator ``nf4::name``.

    Its functions take the arguments as one tuple, whose fields have the schema's names.

    Args:
        name: by which `call` finds it.
        schema: arguments and results.
        fake: the results' shapes and dtypes alone.
        pack: returns what the backend's function of the operator's name takes; past the dispatcher
            its results are the operator's, and may be None or more than the schema promises.
        compute: what the operator computes, where that is more than the backend's function does.
        gradient: of it, if it has one.
        rows: whether the first argument may have any number of dimensions before its last.
    """
    qualified = f"nf4::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.nf4, name).default
    given = overload._schema.arguments
    defaults = [one.default_value for one in given if one.has_default_value()]
    arguments = namedtuple(name, [one.name for one in given], defaults=defaults)  # type: ignore[misc]
    short, target = _short(name, arguments, pack, compute)
    whole = compute or (lambda a: short(*a))
    torch.library.impl(qualified, "CompositeExplicitAutograd")(_packing(arguments, whole))
    torch.library.register_fake(qualified)(_packing(arguments, fake))
    if "()" not in schema:
        torch.library.register_vmap(qualified, partial(_batched, overload, rows))
    eager, functional = None, overload
    if gradient is not None:
        backward, keep = _in_order(arguments, gradient), _keeping(arguments, gradient)
        torch.library.register_autograd(qualified, backward, setup_context=keep)
        functional = _functional(overload, backward, keep)
        if gradient.keep is not None:
            eager = _eager(target, len(given), backward, keep)
    _OPERATORS[name] = Operator(short, eager, overload, functional)


def _packing(arguments: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arguments one by one."""
    return lambda *args, **named: function(arguments(*args, **named))


def _in_order(arguments: Any, gradient: Gradient) -> Callable[..., Any]:
    """Return a backward whose gradients stand in the order of the arguments."""
    places = {name: i for i, name in enumerate(arguments._fields)}

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(places)
        needs = _named(arguments, ctx.needs_input_grad)
        for name, grad in gradient.backward(ctx, needs, *grads).items():
            found[places[name]] = grad
        return tuple(found)

    return backward


def _named(arguments: Any, flags: tuple[Any, ...]) -> Any:
    """Return arguments, or which of them need a gradient, by name.

    PyTorch's dispatcher leaves out arguments that have their defaults, and adds one of its own.
    """
    count = len(arguments._fields)
    if len(flags) == count:  # what arguments(*flags) comes to, a call less
        return tuple.__new__(arguments, flags)
    return arguments(*flags[:count])


def _keeping(arguments: Any, gradient: Gradient) -> Callable[..., None]:
    """Return what fills a context, as PyTorch calls it."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if gradient.keep is not None:
            needs = _named(arguments, ctx.needs_input_grad)
            gradient.keep(ctx, needs, _named(arguments, inputs), output)

    return keep


# Says what computes an operator of its arguments one by one, and what that is given
Target = Callable[[tuple[Any, ...]], tuple[Callable[..., Any], tuple[Any, ...]]]


def _short(
    name: str,
    arguments: Any,
    pack: Callable[..., tuple[Any, ...]] | None,
    compute: Callable[..., Any] | None,
) -> tuple[Callable[..., Any], Target]:
    """Return an operator without its gradient, and without PyTorch's dispatcher; and its target."""
    if pack is None and compute is None:
        raise ValueError(f"{name}: expected pack or compute, got neither")

    def target(args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return backend(name, args[0]), pack(tuple.__new__(arguments, args))  # type: ignore[misc]

    def short(*args: Any) -> Any:  # `target` and `backend` written out: two calls less
        device = args[0].device
        kind = device.type
        given = pack(tuple.__new__(arguments, args))  # type: ignore[misc]
        here = kind == "cpu" or (kind == "cuda" and device.index == streams.current_gpu())
        if here and not torch._C._is_any_autocast_enabled():
            return implementation(name, kind)(*given)
        return run(name, args[0], *given)

    def computing(*args: Any) -> Any:
        return compute(tuple.__new__(arguments, args))  # type: ignore[misc]

    return (short, target) if pack is not None else (computing, lambda args: (computing, args))


def _eager(
    target: Target, inputs: int, backward: Callable[..., Any], keep: Callable[..., None]
) -> Callable[..., Any]:
    """Return an operator with its gradient, without PyTorch's dispatcher."""

    def forward(ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)  # of what is not differentiable, zeros would be made
        function, given = target(args)
        output = function(*given)
        keep(ctx, args, output)
        return output

    def gradients(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> Any:
        return nothing if grad is None else backward(ctx, grad, *others)

    nothing = (None,) * inputs
    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type("NF4", (torch.autograd.Function,), methods)
    # past what Function.apply does for torch.func, whose tensors never come here
    return cast(Callable[..., Any], super(torch.autograd.Function, function).apply)


def no_double_backward(ctx: Any, needs: Any, *grads: Tensor | None) -> Grads:
    """Be the gradient of what computes a gradient."""
    raise NotImplementedError(
        "nf4: the gradient of a gradient is not implemented; "
        "call backward without create_graph=True"
    )


def nothing(arguments: Any) -> None:
    """Fake what writes to its arguments and returns nothing."""


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
    overload: Callable[..., Any], backward: Callable[..., Any], keep: Callable[..., None]
) -> Callable[..., Any]:
    """Return an operator with its gradient for torch.func's grad, vjp, jacrev and vmap.

    What ``torch.library.register_autograd`` makes of them torch.func refuses.
    """
    methods = {
        "forward": staticmethod(overload),
        "backward": staticmethod(backward),
        "setup_context": staticmethod(keep),
        "jvp": staticmethod(_no_forward_mode),
        "generate_vmap_rule": True,
    }
    function: Any = type("NF4", (torch.autograd.Function,), methods)
    return cast(Callable[..., Any], function.apply)


def call(name: str, *args: Any) -> Any:
    """Call an operator, past PyTorch's dispatcher where nobody asks for it."""
    return resolved(name, args)(*args)


def resolved(name: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """Return what computes an operator of its arguments.

    PyTorch's dispatcher costs more than some kernels take, with gradients 150 us. It is needed for
    subclasses and modes (fake tensors, torch.compile, torch.func), while tracing, and to make
    views that are to be negated what they stand for.
    """
    short, eager, overload, functional = _OPERATORS[name]
    compiling = torch.compiler.is_compiling()
    # `is_transformed` written out: a call less
    if not compiling and torch._C._functorch.peek_interpreter_stack() is not None:
        return functional
    if (
        compiling
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or args[0].is_meta  # all are on one device
    ):
        return overload  # type: ignore[no-any-return]
    grad, found = torch.is_grad_enabled(), False
    for a in args:
        kind = type(a)
        if kind in PLAIN:
            if a.is_neg():
                return overload  # type: ignore[no-any-return]
            found = found or (grad and a.requires_grad)
        elif kind not in _NO_TENSORS and isinstance(a, Tensor):
            return overload  # type: ignore[no-any-return]
    if found:
        return overload if eager is None else eager
    return short


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
_FASTER: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
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


@contextmanager
def computing(device_type: str, like: str) -> Iterator[None]:
    """Let a kind of device be computed on as another is, within a ``with``.

    Args:
        device_type: "cpu", "cuda" or "xpu".
        like: one of these, or "reference" for plain PyTorch.
    """
    before = _FASTER[device_type]
    _FASTER[device_type] = _FASTER.get(like, ())
    implementation.cache_clear()
    try:
        yield
    finally:
        _FASTER[device_type] = before
        implementation.cache_clear()


@forgettable
@lru_cache
def implementation(op: str, device_type: str) -> Callable[..., Any]:
    """Return what computes an operator on a kind of device, the reference if nothing faster."""
    file, package = op.removesuffix("_backward"), reference.__name__
    for faster, needs, files in _FASTER.get(device_type, ()):
        if file in files and importlib.util.find_spec(needs) is not None:
            package = faster
    function: Callable[..., Any] = getattr(importlib.import_module(f"{package}.{file}"), op)
    return function


def backend(op: str, like: Tensor) -> Callable[..., Any]:
    """Return what computes an operator where a tensor is; as `run` does, where that is no more."""
    device = like.device
    kind = device.type
    here = kind == "cpu" or (kind == "cuda" and device.index == streams.current_gpu())
    if here and not torch._C._is_any_autocast_enabled():
        return implementation(op, kind)
    return partial(run, op, like)


def run(op: str, like: Tensor, *args: Any) -> Any:
    """Compute an operator where a tensor is, whatever the current device is.

    Autocast is kept out: who calls an operator has chosen the dtypes already.
    """
    device = like.device
    kind = device.type
    casts = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(kind)
    if casts:  # a context manager costs more than a launch
        torch.set_autocast_enabled(kind, False)
    try:
        function = implementation(op, kind)
        if kind == "cpu" or (kind == "cuda" and device.index == streams.current_gpu()):
            return function(*args)
        # Kernels are launched on the current device
        with torch.get_device_module(device).device(device):
            return function(*args)
    finally:
        if casts:
            torch.set_autocast_enabled(kind, True)
