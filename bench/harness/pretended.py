"""A GPU that is not there: kernels are compiled and launched, but for the driver's own call.

What a call costs the host is then measured without a GPU: binding, keys, grids, checks, PyTorch's
own operators, all but what the driver does. Results are left over from memory, and so are worth
nothing. What is counted is the same on every machine.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from torch.profiler import ProfilerActivity, profile
from triton.backends.compiler import GPUTarget

from nf4.kernels import _lanes
from nf4.ops import registry
from nf4.tools import streams


class _Driver:
    """What Triton asks of the driver of a GPU, an H200's."""

    def __init__(self) -> None:
        self.launches = 0
        self.arguments: tuple[Any, ...] = ()  # of the last launch
        self.kept: list[tuple[Any, ...]] | None = None  # of all launches, where a list is put here
        self.utils = SimpleNamespace(
            load_binary=lambda *binary: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, *source: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        self.launches += 1
        self.arguments = arguments
        if self.kept is not None:
            self.kept.append(arguments)

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


_DRIVER = _Driver()  # the only one: what Triton has compiled knows it
DEVICE = 99  # an index that no GPU has, whose kernels these would be taken for


@contextmanager
def pretended_gpu() -> Iterator[_Driver]:
    """Let operators on CPU tensors take a GPU's way, launches included; yields what counts them."""
    real = triton.runtime.driver
    before = real._active
    with (
        mock.patch.object(streams, "gpu_index", lambda tensor: DEVICE),
        mock.patch.object(streams, "current_gpu", lambda: DEVICE),
        mock.patch.object(streams, "current_stream", lambda device: 0),
        mock.patch.object(_lanes, "has_shuffle", lambda tensor: True),
        registry.computing("cpu", "cuda"),
    ):
        real.set_active(_DRIVER)
        try:
            yield _DRIVER
        finally:
            real._active = before


@dataclass(frozen=True)
class Counts:
    """What one call does, once warm.

    Attributes:
        launches: of our kernels.
        operators: of PyTorch's, not counting those that others are made of.
        allocations: of memory.
        frames: functions of Python that are entered, PyTorch's own too.
    """

    launches: int
    operators: int
    allocations: int
    frames: int


def counts(function: Callable[[], Any], driver: _Driver) -> Counts:
    """Return what a call does, on a pretended GPU."""
    function()
    function()
    before = driver.launches
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        function()
    events = [event for event in found.events() if event.name.startswith("aten::")]
    outer = [event for event in events if not _inside(event)]
    made = [event for event in events if event.name in ("aten::empty", "aten::empty_strided")]
    launches = driver.launches - before
    return Counts(launches, len(outer), len(made), entered(function, ("call",)))


def entered(function: Callable[[], Any], events: tuple[str, ...] = ("call", "c_call")) -> int:
    """Return how many functions a call enters once warm, of Python and built in; itself is none."""
    found: list[str] = []
    sys.setprofile(lambda frame, event, argument: found.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    # One of each kind is none of its: the function itself, and setprofile
    return sum(event in events for event in found) - len(events)


def _inside(event: Any) -> bool:
    """Return whether an operator was called by another."""
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith("aten::"):
        parent = parent.cpu_parent
    return parent is not None
