"""Products that are nothing but launches: recorded once, then launched again without the way there.

For a few rows and no gradient, checks, dispatch and plans cost the host several times what a launch
does. What they come to depends on the weight, on sizes and on dtypes: so the launches of a product
are remembered with its weight, and the next product of these sizes only fills in where x, y, bias
and adapter lie. Whatever is unusual goes the long way: gradients, transforms, tracing, other
streams.
"""

import importlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nf4.tensor import PLAIN, NF4Tensor
from nf4.tools import scratch, streams

MOST_ROWS = 64  # beyond which a GPU takes longer than the host
MOST = 16  # products kept of one weight
MOST_OF_ALL = 8192  # some 30 MB of the host
Replays = dict[Any, "Replay | None"]  # of one weight, by what they depend on
_known: "weakref.WeakSet[Replay]" = weakref.WeakSet()
_of_tensors: "weakref.WeakKeyDictionary[NF4Tensor, Replays]" = weakref.WeakKeyDictionary()


def replays_of(q: NF4Tensor) -> Replays:
    """Return what is remembered of a tensor that is no layer's: layers remember themselves."""
    found = _of_tensors.get(q)
    if found is None:
        found = _of_tensors[q] = {}
    return found


class Replay:
    """The launches of one product.

    Attributes:
        weight: where the weight's parts lay.
        shape: of y, which has the dtype of x.
        launches: of nf4/kernels/_launch.py.
    """

    def __init__(self, q: NF4Tensor, given: tuple[Tensor, ...], y: Tensor, launches: Any) -> None:
        self.weight, self.shape = _pointers(*q.parts()), y.shape
        moving = [tensor.data_ptr() for tensor in (y, *given)]
        self.launches = [launch.moving(moving, self.weight) for launch in launches]
        _known.add(self)

    def forget(self) -> None:
        """Be of no weight, and hold no memory."""
        self.weight, self.launches = (), []

    def __call__(self, x: Tensor, given: list[Tensor]) -> Tensor | None:
        """Launch again, and return y; None if that cannot be."""
        y = x.new_empty(self.shape)
        pointers = [y.data_ptr(), x.data_ptr(), *[tensor.data_ptr() for tensor in given]]
        for pointer in pointers:
            if pointer & 15:
                return None
        launches = self.launches  # which another thread may forget
        for launch in launches:
            if not launch(pointers):
                return None
        return y if launches else None


def share(q: NF4Tensor, replays: Replays) -> None:
    """Let a tensor of a layer's weight know what the layer remembers."""
    _of_tensors[q] = replays


_NEW: Any = object()  # what is not known yet


def product(
    q: NF4Tensor,
    replays: Replays | None,
    x: Tensor,
    others: tuple[Tensor | None, ...],
    scaling: Any,
    long: Callable[[], Any],
) -> Tensor | None:
    """Return a product of which the launches are known, or get to know them.

    Args:
        q: the weight.
        replays: of it; None for `replays_of` it.
        x: its input.
        others: bias, and the factors of an adapter.
        scaling: of the adapter.
        long: computes the product the long way; called the first time.

    Returns:
        What long returns, or None where it has to be called every time.
    """
    if torch.compiler.is_compiling() or type(q) is not NF4Tensor:
        return None
    if torch.is_grad_enabled() and any(part.requires_grad for part in q.tensors()):
        return None  # which is refused
    found = _key(q.layout, q.block_size, x, others, scaling)
    if found is None:
        return None
    key, given = found
    if replays is None:
        replays = replays_of(q)
    y: Tensor | None
    replay = replays.get(key, _NEW)
    if replay is None:
        return None  # not of launches alone
    if replay is not _NEW and replay.weight == _pointers(*q.parts()):
        y = replay(x, given)
        return y
    if len(_known) >= MOST_OF_ALL:
        return None
    y, launches = importlib.import_module("nf4.kernels._launch").recorded(long)
    if len(replays) >= MOST:
        replays.clear()
    whole = all(part.is_contiguous() for part in q.tensors())
    places = {tensor.data_ptr() for tensor in (y, x, *given)}
    whole = whole and len(places) == len(given) + 2  # none lies where another does
    usable = launches is not None and whole and type(y) is Tensor and y.is_contiguous()
    replays[key] = Replay(q, (x, *given), y, launches) if usable else None
    return y


def again(
    replays: Replays,
    parts: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    block_size: int,
    x: Tensor,
    others: tuple[Tensor | None, ...],
    scaling: Any = None,
) -> Tensor | None:
    """Return a layer's product if its launches are known, without making a tensor of its weight.

    Not to be called while torch.compile traces.

    Args:
        replays: of the layer's weight.
        parts: packed, int32 in fragments, absmax, absmax2 and offset; None where it has none.
        block_size: of the weight.
        x: its input.
        others: bias, and the factors of an adapter.
        scaling: of the adapter.
    """
    packed, absmax, *scales = parts
    if not replays or packed is None or absmax is None:
        return None
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parts):
        return None
    layout = "fragments" if packed.dtype == torch.int32 else "rows"
    found = _key(layout, block_size, x, others, scaling)
    replay = None if found is None else replays.get(found[0])
    if found is None or replay is None or replay.weight != _pointers(packed, absmax, *scales):
        return None
    return replay(x, found[1])


def _key(
    layout: str, block_size: int, x: Tensor, others: tuple[Tensor | None, ...], scaling: Any
) -> tuple[tuple[Any, ...], list[Tensor]] | None:
    """Return what the launches of a product depend on, and the tensors it is given beside x.

    None where the product has to go the long way.
    """
    if type(x) is not Tensor:
        return None
    device = streams.gpu_index(x)
    if device < 0 or not x.is_contiguous() or x.is_neg() or _is_unusual(x, device):
        return None
    if x.numel() > MOST_ROWS * x.shape[-1]:
        return None
    grad = torch.is_grad_enabled()
    if grad and x.requires_grad:
        return None
    # The thread, for scratch memory; layout and block size, for a layer may come to hold others
    key: list[Any] = [x.shape, x.dtype, scaling, layout, block_size, device, threading.get_ident()]
    given: list[Tensor] = []
    for tensor in others:
        if tensor is None:
            key.append(None)
            continue
        plain = type(tensor) in PLAIN and tensor.is_contiguous() and not tensor.is_neg()
        if not plain or (grad and tensor.requires_grad) or streams.gpu_index(tensor) != device:
            return None
        key.append((tensor.dtype, tensor.shape))
        given.append(tensor)
    return tuple(key), given


def _is_unusual(x: Tensor, device: int) -> bool:
    """Return whether anybody wants to see operators, change dtypes, or have launches elsewhere."""
    casts = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cuda")
    return (
        (casts and torch.get_autocast_dtype("cuda") != x.dtype)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or device != streams.current_gpu()
        or not streams.is_default_stream(device)
    )


def _pointers(
    packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None
) -> tuple[int, ...]:
    if absmax2 is None or offset is None:
        return packed.data_ptr(), absmax.data_ptr()
    return packed.data_ptr(), absmax.data_ptr(), absmax2.data_ptr(), offset.data_ptr()


def _forget_all() -> None:
    for replay in list(_known):
        replay.forget()


scratch.with_release.append(_forget_all)
