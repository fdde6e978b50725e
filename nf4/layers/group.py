"""Layers that are given one input: their products of one or two rows in one launch.

The first of them that is called computes all, and the others return what was computed for the very
tensor they are given, as long as it is unchanged. Weights, files and results stay what they are,
bit for bit. Whatever is unusual each layer computes alone: gradients, more rows, hooks, adapters
that differ in kind or rank, a CPU.
"""

import importlib
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from nf4.ops import replay
from nf4.ops.checks import check_linear, check_lora
from nf4.ops.replay import GroupReplay
from nf4.tensor import Weight
from nf4.tools import streams
from nf4.tools.terms import LowRank

MOST_ROWS = 2
MOST_UNFETCHED = 4  # as where a key and a value are cached, and the query alone is asked for
_NEW: Any = object()  # what is not known yet
Factors = tuple[Tensor, Tensor] | tuple[()]


class Alone(NamedTuple):
    """What a layer computes, if that is a product with at most one plain adapter.

    Attributes:
        linear: the layer with the weight, a `LinearNF4`.
        factors: lora_A and lora_B, or none.
        scaling: of the adapter.
    """

    linear: Any
    factors: Factors = ()
    scaling: float = 1.0


class _Held(NamedTuple):
    """Products that layers have not fetched yet.

    Attributes:
        x: the input, a weak reference.
        now: of the input, see `_now`.
        products: of each layer, by its id: its `_stamp`, and the product.
    """

    x: Any
    now: tuple[Any, ...] | None
    products: dict[int, tuple[Any, Tensor]]


class Group:
    """Two or three layers of one input, which the model holds and this does not.

    What a layer computes it tells by ``alone()``: an `Alone`, or None if that is more.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._members = [weakref.ref(layer) for layer in layers]
        self._replays: dict[Any, GroupReplay | None] = {}
        self._held: _Held | None = None
        self._unfetched = 0  # inputs in turn of which not all products were wanted

    def __reduce__(self) -> Any:
        """Be None in copies and pickles, whose layers are others."""
        return type(None), ()

    def forget(self) -> None:
        """Forget launches and products, as when a layer is moved."""
        self._replays.clear()
        self._held = None

    def product(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return a layer's output; None if it has to compute it alone."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if type(x) is not Tensor or x.is_inference():
            return None
        held = self._held
        if held is not None and held.x() is x:
            found = held.products.pop(id(layer), None)
            if not held.products:
                self._held, self._unfetched = None, 0
            if found is not None:
                alone = None if _is_hooked(layer) else layer.alone()
                now = _now(x)
                same = now is not None and held.now == now
                same = same and alone is not None and found[0] == _stamp(alone)
                return found[1] if same else None
        if self._unfetched >= MOST_UNFETCHED:
            return None
        if not x.numel() or x.numel() > MOST_ROWS * x.shape[-1]:
            return None
        given = self._given(layer)
        ys = None if given is None else self._products(x, given)
        if given is None or ys is None:
            return None
        return self._hold(layer, x, given, ys)

    def _hold(self, layer: Any, x: Tensor, given: list[Alone], ys: list[Tensor]) -> Tensor | None:
        """Hold products for the other layers, and return one layer's."""
        if self._held is not None:
            self._unfetched += 1
        mine: Tensor | None = None
        products: dict[int, tuple[Any, Tensor]] = {}
        for ref, alone, y in zip(self._members, given, ys, strict=True):
            if ref() is layer:
                mine = y
                continue
            stamp = _stamp(alone)
            if stamp is not None:
                products[id(ref())] = (stamp, y)
        self._held = _Held(weakref.ref(x, self._drop), _now(x), products)
        return mine

    def _drop(self, x: Any) -> None:
        """Let go of the products of an input that is gone."""
        held = self._held
        if held is not None and held.x is x:
            self._held = None
            self._unfetched += 1

    def _given(self, layer: Any) -> list[Alone] | None:
        """Return what each member computes; None if one does more, or the layer is none of them."""
        given, is_member = [], False
        for ref in self._members:
            one: Any = ref()
            alone: Alone | None = None if one is None or _is_hooked(one) else one.alone()
            if alone is None:
                return None
            is_member = is_member or one is layer
            given.append(alone)
        hooked: bool = _has_any_global_hook()  # type: ignore[no-untyped-call]
        return given if is_member and not hooked else None

    def _products(self, x: Tensor, given: list[Alone]) -> list[Tensor] | None:
        others: list[Tensor | None] = []
        key: list[Any] = [x.shape, threading.get_ident()]
        places: list[int] = []
        count = len(given[0].factors)
        for linear, factors, scaling in given:
            own, buffers = linear._parameters, linear._buffers
            packed, absmax = own.get("packed"), own.get("absmax")
            absmax2, offset = buffers.get("absmax2"), buffers.get("offset")
            if packed is None or absmax is None or absmax2 is None or offset is None:
                return None
            if len(factors) != count or "bias" not in own:  # one that is computed
                return None
            places += (packed.data_ptr(), absmax.data_ptr(), absmax2.data_ptr(), offset.data_ptr())
            key += (linear.block_size, packed.dtype, packed.nbytes, scaling)
            others.append(own["bias"])
            others += factors
        form = replay.form_of(x, others, any_stream=True)
        if form is None or not form[2]:
            return None
        kinds, moving, _ = form
        remembers = streams.current_stream(kinds[1]) == 0  # and no CUDA graph is captured
        whole = (*key, *kinds)
        known = self._replays.get(whole, _NEW)
        if known is None:
            return None  # not of one launch each
        if remembers and type(known) is GroupReplay and known.weight == places:
            return known.products(x, moving)
        ready = _ready(x, given)
        if ready is None:
            return None
        ys, launches = _recorded(x, *ready)
        if len(self._replays) >= replay.MOST:
            self._replays.clear()
        if ys is None:
            self._replays[whole] = None
        elif remembers and launches is not None and not replay.is_full():
            apart = {tensor.data_ptr() for tensor in (*ys, x, *moving)}
            if len(apart) == len(ys) + 1 + len(moving):
                self._replays[whole] = GroupReplay(places, ys, [x, *moving], launches)
        return ys


# Of each member
_Ready = tuple[list[Weight], list[Tensor | None], list[LowRank]]


def _ready(x: Tensor, given: list[Alone]) -> _Ready | None:
    """Return weights, biases and adapters, or no adapters.

    None where one does not fit x: the layer in question says so when it is called.
    """
    weights, low_ranks = [], []
    for linear, factors, scaling in given:
        q = linear.held()
        try:
            check_linear(x, q, linear.bias)
            if factors:
                check_lora(x, q, *factors, scaling)
        except (TypeError, ValueError):
            return None
        low_ranks += [LowRank(*factors, float(scaling))] if factors else []
        weights.append(q.as_weight())
    return weights, [linear.bias for linear, _, _ in given], low_ranks


def _recorded(
    x: Tensor, weights: list[Weight], biases: list[Tensor | None], low_ranks: list[LowRank]
) -> tuple[list[Tensor] | None, Any]:
    """Return products and their launches; None where each has a launch of its own."""
    compute = importlib.import_module("nf4.gpu.row_group").linear_group
    recorded = importlib.import_module("nf4.kernels._launch").recorded
    found: tuple[list[Tensor] | None, Any] = recorded(
        lambda: compute(x, weights, biases, low_ranks)
    )
    return found


def _stamp(alone: Alone) -> list[Any] | None:
    """Return what tells whether a layer computes what it did: where its operands lie, and when.

    None where that cannot be told: tensors of inference mode have no versions.
    """
    linear, factors, scaling = alone
    own, buffer = linear._parameters.get, linear._buffers.get
    stamp: list[Any] = [scaling]
    parts = (own("packed"), own("absmax"), buffer("absmax2"), buffer("offset"), own("bias"))
    try:
        for tensor in (*parts, *factors):
            if tensor is not None:
                stamp += (tensor.data_ptr(), tensor._version)
    except RuntimeError:
        return None
    return stamp


def _now(x: Tensor) -> tuple[Any, ...] | None:
    """Return what tells whether an input is what it was, and computed with as it was."""
    device = streams.gpu_index(x)
    if replay.is_unusual(x, device):
        return None
    return x._version, x.data_ptr(), streams.current_stream(device), threading.get_ident()


def _is_hooked(layer: nn.Module) -> bool:
    """Return whether something is done before a layer computes, such as bringing its weight."""
    return bool(layer._forward_pre_hooks) or "forward" in vars(layer)


def group_of(layer: nn.Module) -> Group | None:
    """Return the group that a layer is in."""
    found: Group | None = vars(layer).get("_group")
    return found


def grouped(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Return a layer's output from its group; None if it is in none, or has to compute it alone."""
    group: Group | None = layer.__dict__.get("_group")  # `group_of`, two calls less
    return None if group is None else group.product(layer, x)


def join(layers: Sequence[nn.Module]) -> None:
    """Make layers a group."""
    group = Group(layers)
    for layer in layers:
        vars(layer)["_group"] = group


def leave(layer: nn.Module) -> bool:
    """Take a layer out of its group, and return whether it was in one."""
    return vars(layer).pop("_group", None) is not None
