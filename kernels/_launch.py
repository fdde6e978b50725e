"""Launch kernels: each form of one once as Triton does, from then on straight to the driver.

For every call Triton binds arguments, asks each what it is, and makes a key of that: 18 µs on the
host of an H200, where the compiled kernel's own ``run`` takes 7. A `Launch` makes its own key of
what a compilation depends on and keeps what Triton compiled for it. Whatever it does not know goes
Triton's way: AMD, the interpreter, and hooks of profilers.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..tools import streams
from . import _lanes

_HOOKS = triton.knobs.runtime
_NUMBERS = {int, float}
_MOST = 4096  # launches kept of one form


class Prepared(NamedTuple):
    """What Triton compiled for one form of arguments, and how it is run.

    Attributes:
        compiled: what Triton compiled; while it lives, its code stays on the device.
        run: takes grid, stream, function, metadata, hooks and all arguments.
        function: on the device.
        metadata: warps, shared memory.
        pointers: places of tensors among the arguments.
        tail: the constants, as they stand in the kernel's signature after the arguments.
    """

    compiled: Any
    run: Any
    function: Any
    metadata: Any
    pointers: tuple[int, ...]
    tail: tuple[Any, ...]


class Launch:
    """A kernel with its constants and options, to be called with a grid and arguments.

    Attributes:
        kernel: the jit function.
        constants: value of each constexpr but SHUFFLE, which follows the device of the arguments;
            what the kernel does not have is left out.
        options: num_warps, num_stages, enable_fp_fusion.
    """

    def __init__(
        self, kernel: Any, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 3
    ) -> None:
        self.kernel = kernel
        self.constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
        # absmax and products must match a reference bit for bit: no contraction
        self.options = {
            "num_warps": num_warps,
            "num_stages": num_stages,
            "enable_fp_fusion": False,
        }
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    def __call__(self, grid: tuple[int, ...], *args: Tensor | int | float | None) -> None:
        """Launch on the current device and stream.

        Args:
            grid: programs, in one to three dimensions.
            *args: of the kernel, in order, the first one a tensor; None for a tensor that the
                constants say is not read.
        """
        first: Any = args[0]
        device = streams.gpu_index(first)
        if device < 0:
            self._launch(grid, args)
            return
        values: list[Any] = []
        form: list[Any] = [device]  # what Triton compiles for
        bits = 0
        for a in args:
            kind = type(a)
            if kind is int:  # as it is: 1, multiples of 16 and the width matter
                values.append(a)
                form.append(a)
            elif kind is float:
                values.append(a)
            else:
                tensor: Any = first if a is None else a
                pointer = tensor.data_ptr()
                bits |= pointer
                values.append(pointer)
                form.append(tensor.dtype)
        key = tuple(form)
        prepared = self._prepared.get(key)
        x, y, z = (*grid, 1, 1)[:3]
        if bits & 15 or (prepared is not None and _is_watched(self.kernel)):
            self._launch(grid, args)
            prepared = None
        elif prepared is None:
            prepared = self._prepare(key, grid, args)
        else:
            stream = streams.current_stream(device)
            start = (x, y, z, stream, prepared.function, prepared.metadata, None, None, None)
            prepared.run(*start, *values, *prepared.tail)
        if _recording is not None:
            if prepared is None:
                spoil()
            else:
                _record(Recorded(self.kernel, prepared, (x, y, z), values, args))

    def _prepare(
        self, key: tuple[Any, ...], grid: tuple[int, ...], args: tuple[Any, ...]
    ) -> "Prepared | None":
        """Launch as Triton does, and keep what it compiled, if it can be run without Triton.

        All tensors begin at multiples of 16 bytes.
        """
        compiled = self._launch(grid, args)
        if compiled is None or torch.version.hip is not None:
            return None
        if len(self._prepared) >= _MOST:  # of sequences of ever new lengths
            self._prepared.clear()
        constants = self._constants(args[0])
        self._prepared[key] = prepared = Prepared(
            compiled,
            compiled.run,
            compiled.function,
            compiled.packed_metadata,
            tuple(i for i, a in enumerate(args) if type(a) not in _NUMBERS),
            tuple(constants[name] for name in self.kernel.arg_names[len(args) :]),
        )
        return prepared

    def _launch(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        """Launch as Triton does, and return what it compiled."""
        given = [args[0] if a is None else a for a in args]
        return self.kernel[grid](*given, **self._constants(args[0]), **self.options)

    def _constants(self, like: Tensor) -> dict[str, Any]:
        if "SHUFFLE" in self.kernel.arg_names:
            return {**self.constants, "SHUFFLE": _lanes.has_shuffle(like)}
        return self.constants


def _is_watched(kernel: Any) -> bool:
    """Return whether somebody wants to know of launches, as profilers do."""
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    for hook in (enter, leave):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return bool(kernel.pre_run_hooks)


class Recorded:
    """A launch as it was, on the default stream, with all its arguments."""

    def __init__(
        self,
        kernel: Any,
        prepared: Prepared,
        grid: tuple[int, int, int],
        values: list[Any],
        args: tuple[Any, ...],
    ) -> None:
        self.kernel, self.prepared, self.run = kernel, prepared, prepared.run
        self.start = (*grid, 0, prepared.function, prepared.metadata, None, None, None)
        self.values, self.pointers = [*values, *prepared.tail], prepared.pointers
        self.kept = args  # whose memory the values point to
        self.places: list[tuple[int, int]] = []

    def moving(self, pointers: Sequence[int], held: Sequence[int]) -> "Recorded":
        """Let what lies at some pointers lie elsewhere in later launches; returns the launch.

        What lies at those of held is not kept: the caller knows that it lies there still.
        """
        where = {pointer: i for i, pointer in enumerate(pointers)}
        own = [(i, self.values[i]) for i in self.pointers]
        self.places = [(i, where[pointer]) for i, pointer in own if pointer in where]
        elsewhere = {*pointers, *held}
        self.kept = tuple(self.kept[i] for i, pointer in own if pointer not in elsewhere)
        return self

    def __call__(self, pointers: Sequence[int]) -> bool:
        """Launch with other pointers, or return False where somebody wants to know of launches."""
        if _is_watched(self.kernel):
            return False
        values = self.values.copy()
        for place, i in self.places:
            values[place] = pointers[i]
        self.run(*self.start, *values)
        return True


class _Recording:
    """Launches of one thread, while nothing else is done with their results."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.launches: list[Recorded] = []
        self.whole = True


_recording: _Recording | None = None
_lock = threading.RLock()


def recorded(function: Callable[[], Any]) -> tuple[Any, list[Recorded] | None]:
    """Call a function, and return its result and launches; None if it did more than launching."""
    global _recording
    with _lock:
        if _recording is not None:  # of this thread: what is recorded calls for another product
            _recording.whole = False
            return function(), None
        own = _recording = _Recording()
        try:
            result = function()
        finally:
            _recording = None
    return result, own.launches if own.whole and own.launches else None


def _record(launch: Recorded) -> None:
    current = _recording
    if current is not None and current.thread == threading.get_ident():
        current.launches.append(launch)


def spoil() -> None:
    """Say that what is computed now is more than launches."""
    current = _recording
    if current is not None and current.thread == threading.get_ident():
        current.whole = False


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that begins at a whole word, as kernels read words: itself, or a copy."""
    if tensor.data_ptr() % 4 == 0:
        return tensor
    spoil()
    return tensor.clone()
