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
from nf4.tensor import PARTS, Weight
from nf4.tools import streams
from nf4.tools.terms import LowRank

MOST_ROWS = 2
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


class Group:
    """Two or three layers of one input, which the model holds and this does not.

    What a layer computes it tells by ``alone()``: an `Alone`, or None if that is more.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._members = [weakref.ref(layer) for layer in layers]
        self._replays: dict[Any, GroupReplay | None] = {}
        # The input whose products are here, its version, and of each layer what is not yet fetched
        self._held: tuple[Any, int, dict[int, tuple[Alone, Tensor]]] | None = None

    def __reduce__(self) -> Any:
        """Be None in copies and pickles, whose layers are others."""
        return type(None), ()

    def product(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return a layer's output; None if it has to compute it alone."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        held = self._held
        if held is not None and held[0]() is x:
            found = held[2].pop(id(layer), None)
            if not held[2]:
                self._held = None
            if found is not None:
                same = held[1] == x._version and _is(found[0], layer.alone())
                return found[1] if same else None
        if type(x) is not Tensor or not x.ndim or x.numel() > MOST_ROWS * x.shape[-1]:
            return None
        given = self._given(layer)
        ys = None if given is None else self._products(x, given)
        if given is None or ys is None:
            return None
        mine: Tensor | None = None
        computed: dict[int, tuple[Alone, Tensor]] = {}
        for ref, alone, y in zip(self._members, given, ys, strict=True):
            if ref() is layer:
                mine = y
            else:
                computed[id(ref())] = (alone, y)
        self._held = (weakref.ref(x), x._version, computed)
        return mine

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
        for linear, factors, scaling in given:
            own = linear._parameters.get
            packed, absmax, absmax2, offset = map(own, PARTS)
            if packed is None or absmax is None or absmax2 is None or offset is None:
                return None
            places += (packed.data_ptr(), absmax.data_ptr(), absmax2.data_ptr(), offset.data_ptr())
            key += (linear.block_size, packed.dtype, scaling)
            others.append(own("bias") if "bias" in linear._parameters else linear.bias)
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
        elif remembers and launches is not None:
            apart = {tensor.data_ptr() for tensor in (*ys, x, *moving)}
            if len(apart) == len(ys) + 1 + len(moving):
                self._replays[whole] = GroupReplay(places, ys, [x, *moving], launches)
        return ys


# Of each member
_Ready = tuple[list[Weight], list[Tensor | None], list[LowRank]]


def _ready(x: Tensor, given: list[Alone]) -> _Ready | None:
    """Return weights, biases and adapters, or no adapters; None where members differ.

    So too where one does not fit x: the layer in question says so when it is called.
    """
    if len({len(one.factors) for one in given}) > 1:
        return None
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


def _is(first: Alone, second: Alone | None) -> bool:
    """Return whether a layer computes what it did."""
    if second is None or first.linear is not second.linear or first.scaling != second.scaling:
        return False
    pairs = zip(first.factors, second.factors, strict=False)
    return len(first.factors) == len(second.factors) and all(a is b for a, b in pairs)


def _is_hooked(layer: nn.Module) -> bool:
    """Return whether something is done before a layer computes, such as bringing its weight."""
    return bool(layer._forward_pre_hooks) or "forward" in vars(layer)


def group_of(layer: nn.Module) -> Group | None:
    """Return the group that a layer is in."""
    found: Group | None = vars(layer).get("_group")
    return found


def join(layers: Sequence[nn.Module]) -> None:
    """Make layers a group."""
    group = Group(layers)
    for layer in layers:
        vars(layer)["_group"] = group


def leave(layer: nn.Module) -> bool:
    """Take a layer out of its group, and return whether it was in one."""
    return vars(layer).pop("_group", None) is not None
