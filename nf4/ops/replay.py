"""Products that are nothing but launches: recorded once, then launched again without the way there.

For a few rows and no gradient, checks, dispatch and plans cost the host several times what a launch
does. What they come to depends on the weight, on sizes and on dtypes: so the launches of a product
are remembered with its weight, and the next product of these sizes only fills in where x, y, bias
and adapter lie. Of a layer's other products, those in training above all, it is remembered that
they passed the checks: the next one of this form goes straight to its operator. Whatever is unusual
goes the long way: transforms, tracing, other streams.
"""

import importlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nf4.tensor import PLAIN, NF4Tensor
from nf4.tools import scratch, streams

MOST_ROWS = 64  # beyond which a GPU takes longer than the host
MOST = 16  # products kept of one weight
MOST_OF_ALL = 8192  # some 30 MB of the host
# Of one weight, by what they depend on; None for what is not launches alone
Replays = dict[Any, "Replay | Checked | None"]
Called = tuple[Callable[..., Any], tuple[Any, ...]]
Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_known: "weakref.WeakSet[Replay]" = weakref.WeakSet()
_lock = threading.Lock()  # of this set: other threads add to it while one forgets all
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
        self.weight: Sequence[int] = _pointers(*q.parts())
        self.shape = tuple(y.shape)  # which takes less to make a tensor of
        moving = [tensor.data_ptr() for tensor in (y, *given)]
        self.launches = [launch.moving(moving, self.weight) for launch in launches]
        _keep(self)

    def forget(self) -> None:
        """Be of no weight, and hold no memory."""
        self.weight, self.launches = (), []

    def __call__(self, x: Tensor, given: list[Tensor]) -> Tensor | None:
        """Launch again, and return y; None if that cannot be."""
        y = x.new_empty(self.shape)
        pointers = [y.data_ptr(), x.data_ptr(), *[tensor.data_ptr() for tensor in given]]
        return y if self.launched(pointers) else None

    def launched(self, pointers: list[int]) -> bool:
        """Launch again with what moves lying there, and return whether that could be."""
        for pointer in pointers:
            if pointer & 15:
                return False
        launches = self.launches  # which another thread may forget
        for launch in launches:
            if not launch(pointers):
                return False
        return bool(launches)


class GroupReplay(Replay):
    """The launches of the products of one input with several weights.

    Args:
        weight: where the parts of all weights lay.
        ys: the products.
        given: the input, and what else may lie elsewhere later.
        launches: as recorded.
    """

    def __init__(
        self, weight: list[int], ys: list[Tensor], given: list[Tensor], launches: Any
    ) -> None:
        self.weight, self.shapes = weight, [tuple(y.shape) for y in ys]
        moving = [tensor.data_ptr() for tensor in (*ys, *given)]
        self.launches = [launch.moving(moving, weight) for launch in launches]
        _keep(self)

    def products(self, x: Tensor, given: list[Tensor]) -> list[Tensor] | None:
        """Launch again, and return the products; None if that cannot be."""
        ys = [x.new_empty(shape) for shape in self.shapes]
        pointers = [tensor.data_ptr() for tensor in (*ys, x, *given)]
        return ys if self.launched(pointers) else None


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
    form = form_of(x, others)
    if form is None or not form[2]:
        return None
    kinds, given, _ = form
    # The thread, for scratch memory; layout and block size, for a layer may come to hold others
    key = (x.shape, threading.get_ident(), q.layout, q.block_size, scaling, *kinds)
    if replays is None:
        replays = replays_of(q)
    y: Tensor | None
    replay = replays.get(key, _NEW)
    if replay is None:
        return None  # not of launches alone
    if type(replay) is Replay and replay.weight == _pointers(*q.parts()):
        y = replay(x, given)
        return y
    if is_full():
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
    parts: Parts,
    block_size: int,
    x: Tensor,
    others: tuple[Tensor | None, ...],
    scaling: Any = None,
) -> Tensor | None:
    """Return a layer's product the way that is known, without making a tensor of its weight.

    Not to be called while torch.compile traces.

    Args:
        replays: of the layer's weight.
        parts: packed, int32 in fragments, absmax, absmax2 and offset; None where it has none.
        block_size: of the weight.
        x: its input.
        others: bias, and the factors of an adapter.
        scaling: of the adapter.
    """
    packed, absmax, absmax2, offset = parts
    if not replays or packed is None or absmax is None:
        return None
    if torch.is_grad_enabled() and any([p is not None and p.requires_grad for p in parts]):
        return None
    form = form_of(x, others)
    if form is None:
        return None
    kinds, given, is_small = form
    layout = "fragments" if packed.dtype == torch.int32 else "rows"
    places = _pointers(packed, absmax, absmax2, offset)
    if is_small:
        replay = replays.get((x.shape, threading.get_ident(), layout, block_size, scaling, *kinds))
        if type(replay) is Replay and replay.weight == places:
            y = replay(x, given)
            return y
    sizes = (packed.nbytes, absmax.nbytes, 0 if absmax2 is None else absmax2.nbytes)
    checked = replays.get((sizes, x.shape[-1], layout, block_size, scaling, *kinds))
    if type(checked) is not Checked or checked.places != places:
        return None
    for ref, part in zip(checked.scales, parts[1:], strict=True):
        if ref() is not part:
            return None
    if layout == "fragments":
        packed = packed.view(torch.uint8)
    out = checked.function(x, packed, absmax, absmax2, offset, *others, *checked.tail)
    result: Tensor = out[0] if type(out) is tuple else out
    return result


class Checked(NamedTuple):
    """A layer's product whose arguments passed the checks: others of the same form do too.

    Attributes:
        places: where the weight's parts lay.
        scales: absmax, absmax2 and offset, which nothing here holds: who moves a layer away wants
            its memory.
        function: the operator, as it is called past PyTorch's dispatcher.
        tail: the operator's arguments after tensors.
    """

    places: tuple[int, ...]
    scales: "tuple[Callable[[], Tensor | None], ...]"
    function: Callable[..., Any]
    tail: tuple[Any, ...]


def remember(
    replays: Replays,
    q: NF4Tensor,
    x: Tensor,
    others: tuple[Tensor | None, ...],
    scaling: Any,
    called: Called,
) -> None:
    """Let `again` know a layer's product whose arguments passed the checks.

    Args:
        replays: of the layer's weight.
        q: the weight.
        x: its input.
        others: bias, and the factors of an adapter.
        scaling: of the adapter.
        called: what computed the product, and its arguments after these tensors.
    """
    form = None if torch.compiler.is_compiling() else form_of(x, others)
    if form is None or type(q) is not NF4Tensor:
        return
    scales = tuple(_nothing if s is None else weakref.ref(s) for s in q.parts()[1:])
    sizes = (q.packed.nbytes, q.absmax.nbytes, 0 if q.absmax2 is None else q.absmax2.nbytes)
    key = (sizes, x.shape[-1], q.layout, q.block_size, scaling, *form[0])
    if len(replays) >= MOST:
        replays.clear()
    replays[key] = Checked(_pointers(*q.parts()), scales, *called)


def _nothing() -> None:
    """Be the reference to a part that a weight does not have."""


def form_of(
    x: Tensor, others: Sequence[Tensor | None], any_stream: bool = False
) -> tuple[list[Any], list[Tensor], bool] | None:
    """Return what products alike have in common, their weight apart.

    None where a product has to go the long way. Else dtypes, shapes, device and what wants a
    gradient; bias and the factors of an adapter, those there are; and whether the product may be
    launches alone: few rows and no gradient.
    """
    if type(x) is not Tensor:
        return None
    device = streams.gpu_index(x)
    if device < 0 or not x.ndim or not x.is_contiguous() or x.is_neg() or is_unusual(x, device):
        return None
    if not any_stream and streams.current_stream(device) != 0:
        return None  # a CUDA graph may be captured
    grad = torch.is_grad_enabled()
    wants = grad and x.requires_grad
    kinds: list[Any] = [x.dtype, device, wants]
    given: list[Tensor] = []
    for tensor in others:
        if tensor is None:
            kinds.append(None)
            continue
        plain = type(tensor) in PLAIN and tensor.is_contiguous() and not tensor.is_neg()
        if not plain or streams.gpu_index(tensor) != device:
            return None
        wanted = grad and tensor.requires_grad
        wants = wants or wanted
        kinds.append((tensor.dtype, tensor.shape, wanted))
        given.append(tensor)
    is_small = not wants and x.numel() <= MOST_ROWS * x.shape[-1]
    return kinds, given, is_small


def is_unusual(x: Tensor, device: int) -> bool:
    """Return whether anybody wants to see operators, change dtypes, or compute elsewhere."""
    casts = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cuda")
    return (
        (casts and torch.get_autocast_dtype("cuda") != x.dtype)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or device != streams.current_gpu()
    )


def _pointers(
    packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None
) -> tuple[int, ...]:
    if absmax2 is None or offset is None:
        return packed.data_ptr(), absmax.data_ptr()
    return packed.data_ptr(), absmax.data_ptr(), absmax2.data_ptr(), offset.data_ptr()


def is_full() -> bool:
    """Return whether no more launches are to be remembered."""
    return len(_known) >= MOST_OF_ALL


def _keep(replay: Replay) -> None:
    with _lock:
        _known.add(replay)


def _forget_all() -> None:
    with _lock:
        found = list(_known)
    for replay in found:
        replay.forget()


scratch.with_release.append(_forget_all)
