"""Let launchers of kernels run what the compiler made for an NVIDIA GPU, on the CPU.

Inside `emulated(target)` a launch ``kernel[grid](...)`` on CPU tensors compiles the kernel as the
JIT would for these arguments, and runs the PTX on `ptx_machine`. Kernels take NVIDIA's path.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from ptx_machine import Machine
from torch import Tensor
from triton.runtime.jit import JITFunction

from nf4.kernels import _aot, _lanes

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


@dataclass
class Emulation:
    """What launches do inside `emulated`.

    Attributes:
        target: GPU to compile for, such as ``"sm_90"``.
        programs: the thread blocks to run, as (x, y, z); all if None.
        edit: changes the PTX before it runs; how a test puts a mistake in.
        launches: name of the kernel of each launch so far.
    """

    target: str
    programs: list[tuple[int, int, int]] | None = None
    edit: Callable[[str], str] = lambda ptx: ptx
    launches: list[str] = field(default_factory=list)

    def launch(
        self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any
    ) -> None:
        """Take the place of ``JITFunction.run``."""
        values = dict(zip(kernel.arg_names, args, strict=False))
        options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
        values |= {k: v for k, v in kwargs.items() if k in kernel.arg_names}
        for parameter in kernel.params:
            if parameter.has_default and parameter.name not in values:
                values[parameter.name] = parameter.default
        constants = {p.name: values.pop(p.name) for p in kernel.params if p.is_constexpr}
        constants |= {n: v for n, v in values.items() if v is None or (type(v) is int and v == 1)}
        values = {name: v for name, v in values.items() if name not in constants}
        signature = {name: _type(v) for name, v in values.items()}
        divisible = [name for name, v in values.items() if _is_divisible(v)]
        compiled = _aot.compile_kernel(
            kernel, signature, constants, divisible, self.target, options
        )
        self.launches.append(kernel.__name__)
        machine = Machine(self.edit(compiled.asm["ptx"]), compiled.metadata.shared)
        grid = (*(grid({**values, **constants}) if callable(grid) else grid), 1, 1)[:3]
        registers = [_register(machine, value) for value in values.values()]
        everything = [(x, y, z) for z, y, x in product(*map(range, reversed(grid)))]
        machine.run(registers, self.programs or everything, grid)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _register(machine: Machine, value: Any) -> int:
    """Return an argument as a register; of a tensor, map the memory from its first element on."""
    if isinstance(value, Tensor):
        pairs = zip(value.shape, value.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in pairs) if value.numel() else 0
        flat = value.detach().as_strided((extent,), (1,)).view(torch.uint8).numpy()
        return machine.memory.map(flat, value.data_ptr())
    if isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return value & 0xFFFFFFFFFFFFFFFF


@contextmanager
def emulated(target: str) -> Iterator[Emulation]:
    """Run every launch inside the block on the CPU, as compiled for a target."""
    emulation = Emulation(target)

    def run(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
        emulation.launch(kernel, *args, **kwargs)
        return SimpleNamespace()

    shuffle = mock.patch.object(_lanes, "has_shuffle", lambda x: True)
    with mock.patch.object(JITFunction, "run", run), shuffle:
        yield emulation
