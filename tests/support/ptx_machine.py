"""Run the PTX that Triton made for NVIDIA GPUs on the CPU, one thread block at a time.

All threads of a block go in lockstep, numpy over threads. Checked on the way: bounds and alignment
of every access to global memory, alignment of shared accesses, shared bytes read before they were
written, branches that are not uniform. A copy by cp.async and a product by wgmma take effect only
at the wait that covers them, so that a missing wait changes the result. Not checked: races between
warps, which lockstep hides, and time. Not known: TMA, clusters, the tensor cores of sm_100.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ptx_program import Address, Instruction, Number, Operand, Register, parse
from ptx_tensor_cores import TensorCores
from ptx_values import BITS, U, UnknownInstruction, evaluate, from_float, low_bits, signed, to_float

# What LLVM leaves undefined, bytes that a prmt does not select for example, reads as this.
GARBAGE = 0x7FEDCBA97FEDCBA9
PARAMETERS = 0x1000  # where parameters lie in their own memory, eight bytes each


class PtxError(Exception):
    """The program did what a GPU would not accept."""


class GlobalMemory:
    """Buffers, each in an address range of its own."""

    def __init__(self) -> None:
        self._buffers: list[tuple[int, np.ndarray]] = []

    def map(self, data: np.ndarray, alignment: int) -> int:
        """Give a buffer an address that is the given number modulo 4096."""
        base = ((len(self._buffers) + 1) << 40) + alignment % 4096
        self._buffers.append((base, data))
        return base

    def at(self, address: np.ndarray, size: int, on: np.ndarray) -> Iterator[tuple[Any, Any, Any]]:
        """Yield buffer, threads and offsets of an access by the threads that are on."""
        wanted = address[on]
        if (wanted % U(size)).any():
            raise PtxError(f"misaligned access of {size} bytes")
        number = (wanted >> U(40)).astype(np.int64)
        for k in np.unique(number):
            if not 1 <= k <= len(self._buffers):
                raise PtxError("access outside every buffer")
            base, data = self._buffers[k - 1]
            offset = (wanted[number == k] - U(base)).astype(np.int64)
            if offset.min() < 0 or offset.max() + size > data.size:
                worst = offset.min() if offset.min() < 0 else offset.max()
                raise PtxError(
                    f"out of bounds: offset {worst} of {data.size} bytes, buffer {k - 1}"
                )
            yield data, np.flatnonzero(on)[number == k], offset


class Machine(TensorCores):
    """One kernel, its global memory, and the registers and shared memory of the running block."""

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        self.program = parse(ptx)
        self.threads = self.program.threads
        self.memory = GlobalMemory()
        self.shared_bytes = max(shared_bytes, 16) + 1024
        self.lane = np.arange(self.threads) % 32
        self.warp_base = np.arange(self.threads) // 32 * 32
        self.handlers: dict[str, Callable[[list[str], list[Operand], np.ndarray], None]] = {
            "mov": self._mov,
            "ld": self._ld,
            "st": self._st,
            "cp": self._cp_async,
            "shfl": self._shfl,
            "redux": self._redux,
            "atom": self._atom,
            "red": self._atom,
            "wgmma": self._wgmma,
            "mma": self._mma,
            "ldmatrix": self._matrix,
            "stmatrix": self._matrix,
            **dict.fromkeys(("bar", "barrier", "fence", "membar"), lambda op, a, on: None),
        }

    # --- operands

    def full(self, value: int) -> np.ndarray:
        """Return the same value for every thread."""
        return np.full(self.threads, value, U)

    def get(self, operand: Operand) -> np.ndarray:
        """Read an operand: one value a thread."""
        if isinstance(operand, Number):
            return self.full(operand.bits)
        assert isinstance(operand, Register), operand
        value = self.registers.get(operand.name)
        if value is not None:
            return value
        if operand.name == "global_smem":
            return self.full(0)
        if operand.name in self.arguments:  # where a parameter lies
            return self.full(PARAMETERS + 8 * list(self.arguments).index(operand.name))
        if operand.name.startswith("%") and "." not in operand.name:
            return self.full(GARBAGE)
        raise PtxError(f"undefined {operand.name}")

    def set(self, operand: Operand, value: np.ndarray, on: np.ndarray, bits: int = 64) -> None:
        """Write a register in the threads that are on."""
        assert isinstance(operand, Register), operand
        if operand.name == "_":
            return
        value = np.broadcast_to(value, (self.threads,))
        if value.dtype != bool:
            value = low_bits(value, bits)
        if not on.all():
            old = self.registers.get(operand.name, np.zeros(self.threads, value.dtype))
            value = np.where(on, value, old)
        self.registers[operand.name] = np.array(value)

    @staticmethod
    def vector(operand: Operand) -> tuple[Operand, ...]:
        """Return the parts of ``{a, b}``, or a single operand as one part."""
        return operand if isinstance(operand, tuple) else (operand,)

    def address(self, operand: Operand) -> np.ndarray:
        """Return the address of each thread."""
        assert isinstance(operand, Address), operand
        with np.errstate(over="ignore"):
            return self.get(operand.base) + U(operand.offset & 0xFFFFFFFFFFFFFFFF)

    @staticmethod
    def to_bytes(values: np.ndarray, size: int) -> np.ndarray:
        """Return the low bytes of each value, ``[threads, size]``."""
        return np.ascontiguousarray(values, U).view(np.uint8).reshape(-1, 8)[:, :size]

    @staticmethod
    def from_bytes(raw: np.ndarray) -> np.ndarray:
        """Return ``[threads, up to 8]`` bytes as a value a thread."""
        wide = np.zeros((raw.shape[0], 8), np.uint8)
        wide[:, : raw.shape[1]] = raw
        return wide.view(U)[:, 0]

    # --- memory

    def load_global(self, address: np.ndarray, size: int, on: np.ndarray) -> np.ndarray:
        """Read ``[threads, size]`` bytes."""
        out = np.zeros((self.threads, size), np.uint8)
        if on.any():
            for data, threads, offset in self.memory.at(address, size, on):
                out[threads] = data[offset[:, None] + np.arange(size)]
        return out

    def store_global(self, address: np.ndarray, values: np.ndarray, on: np.ndarray) -> None:
        """Write ``[threads, size]`` bytes."""
        size = values.shape[1]
        if on.any():
            for data, threads, offset in self.memory.at(address, size, on):
                data[offset[:, None] + np.arange(size)] = values[threads]

    def _shared_index(self, address: np.ndarray, size: int, on: np.ndarray) -> np.ndarray:
        first = address[on].astype(np.int64)
        if (first % size).any():
            raise PtxError(f"misaligned shared access of {size} bytes")
        if first.size and (first.min() < 0 or first.max() + size > self.shared_bytes):
            raise PtxError("shared access out of bounds")
        return first[:, None] + np.arange(size)

    def load_shared(self, address: np.ndarray, size: int, on: np.ndarray) -> np.ndarray:
        """Read ``[threads, size]`` bytes of shared memory."""
        out = np.zeros((self.threads, size), np.uint8)
        index = self._shared_index(address, size, on)
        self.unwritten += int((~self.written[index]).sum())
        out[on] = self.shared[index]
        return out

    def store_shared(self, address: np.ndarray, values: np.ndarray, on: np.ndarray) -> None:
        """Write ``[threads, size]`` bytes of shared memory."""
        index = self._shared_index(address, values.shape[1], on)
        self.shared[index] = values[on]
        self.written[index] = True

    def _ld(self, op: list[str], a: list[Operand], on: np.ndarray) -> None:
        bits = BITS[op[-1]]
        if op[1] == "param":
            assert isinstance(a[1], Address) and isinstance(a[1].base, Register)
            name = a[1].base.name
            if name in self.arguments:
                self.set(a[0], self.full(self.arguments[name]), on, bits)
                return
            values = np.array(list(self.arguments.values()), U)
            at = self.address(a[1]) - U(PARAMETERS)
            if (at[on] % U(8)).any() or (at[on] // U(8) >= len(values)).any():
                raise PtxError("an address of no parameter")
            self.set(a[0], values[np.where(on, at // U(8), 0).astype(np.int64)], on, bits)
            return
        names, size = self.vector(a[0]), bits // 8
        load = self.load_global if "global" in op else self.load_shared
        raw = load(self.address(a[1]), size * len(names), on)
        for i, name in enumerate(names):
            self.set(name, self.from_bytes(raw[:, size * i : size * (i + 1)]), on)

    def _st(self, op: list[str], a: list[Operand], on: np.ndarray) -> None:
        size = BITS[op[-1]] // 8
        parts = [self.to_bytes(self.get(x), size) for x in self.vector(a[1])]
        store = self.store_global if "global" in op else self.store_shared
        store(self.address(a[0]), np.concatenate(parts, 1), on)

    def _cp_async(self, op: list[str], a: list[Operand], on: np.ndarray) -> None:
        if op[1] != "async":
            raise UnknownInstruction(".".join(op))
        if op[2] in ("commit_group", "wait_all"):
            self.copies.append(self.copy_group)
            self.copy_group = []
            if op[2] == "wait_all":
                self.drain(self.copies, 0)
        elif op[2] == "wait_group":
            self.drain(self.copies, int(self.get(a[0])[0]))
        elif op[2] in ("ca", "cg"):
            target, source = self.address(a[0]), self.address(a[1])
            size = int(self.get(a[2])[0])
            live = on & (self.get(a[3]) > 0) if len(a) > 3 else on  # a source of 0 bytes: zeros

            def copy() -> None:
                self.store_shared(target, self.load_global(source, size, live), on)

            self.copy_group.append(copy)
        else:
            raise UnknownInstruction(".".join(op))

    def _atom(self, op: list[str], a: list[Operand], on: np.ndarray) -> None:
        if "global" not in op or "add" not in op or op[-1] not in ("f32", "u32", "s32"):
            raise UnknownInstruction(".".join(op))
        returns = op[0] == "atom"
        address = self.address(a[1] if returns else a[0])
        value = self.get(a[2] if returns else a[1])
        for thread in np.flatnonzero(on):
            for data, _, offset in self.memory.at(address, 4, np.arange(self.threads) == thread):
                cell = data[offset[0] : offset[0] + 4]
                old = self.from_bytes(cell[None])
                if returns:
                    self.set(
                        a[0], np.where(np.arange(self.threads) == thread, old, self.get(a[0])), on
                    )
                kind = op[-1]
                if kind == "f32":
                    new = from_float(to_float(old, kind) + to_float(value[thread], kind), kind)
                else:
                    new = low_bits(old + value[thread], 32)
                cell[:] = self.to_bytes(new, 4)[0]

    def drain(self, queue: list[list[Callable[[], None]]], keep: int) -> None:
        """Let all but the newest groups take effect."""
        while len(queue) > keep:
            for action in queue.pop(0):
                action()

    # --- registers

    def _mov(self, op: list[str], a: list[Operand], on: np.ndarray) -> None:
        bits = BITS[op[-1]]
        if op[-1] == "pred":
            self.set(a[0], self.get(a[1]).astype(bool), on)
        elif isinstance(a[0], tuple):
            value, width = self.get(a[1]), bits // len(a[0])
            for i, part in enumerate(a[0]):
                self.set(part, value >> U(width * i), on, width)
        else:
            parts = self.vector(a[1])
            width, value = bits // len(parts), self.full(0)
            for i, part in enumerate(parts):
                value = value | (low_bits(self.get(part), width) << U(width * i))
            self.set(a[0], value, on, bits)

    def _shfl(self, op: list[str], a: list[Operand], on: np.ndarray) -> None:
        if not on.all():
            raise PtxError("a shuffle in a part of a warp")
        assert isinstance(a[0], Register)
        names, value = a[0].name.split("|"), self.get(a[1])
        by, c = low_bits(self.get(a[2]), 5).astype(np.int64), self.get(a[3]).astype(np.int64)
        clamp, segment = c & 31, (c >> 8) & 31
        low, high = self.lane & segment, (self.lane & segment) | (clamp & ~segment)
        if op[2] == "idx":
            source = low | (by & ~segment)
        elif op[2] == "up":
            source = self.lane - by
        else:
            source = self.lane ^ by if op[2] == "bfly" else self.lane + by
        inside = source >= high if op[2] == "up" else source <= high
        source = np.where(inside, source, self.lane)
        self.set(Register(names[0]), value[self.warp_base + source], on, 32)
        if len(names) > 1:
            self.set(Register(names[1]), inside, on)

    def _redux(self, op: list[str], a: list[Operand], on: np.ndarray) -> None:
        if op[2:] != ["add", "s32"] or (low_bits(self.get(a[2]), 32) != 0xFFFFFFFF).any():
            raise UnknownInstruction(".".join(op))
        if not on.all():
            raise PtxError("a reduction in a part of a warp")
        total = signed(self.get(a[1]), 32).reshape(-1, 32).sum(axis=1)
        self.set(a[0], total.repeat(32).astype(U), on, 32)

    # --- control

    def run(
        self,
        arguments: list[int],
        programs: Iterable[tuple[int, int, int]],
        grid: tuple[int, int, int],
    ) -> None:
        """Run thread blocks; arguments are register values in the order of the parameters."""
        names = [name for name, _ in self.program.parameters]
        arguments = arguments + [0] * (len(names) - len(arguments))  # Triton's scratch pointers
        self.arguments = dict(zip(names, arguments, strict=True))
        for program in programs:
            self._run_block(program, grid)

    def _run_block(self, block: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        thread = np.arange(self.threads, dtype=U)
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": thread,
            "%tid.y": self.full(0),
            "%tid.z": self.full(0),
            "%laneid": thread % U(32),
            "%warpid": thread // U(32),
            "%ntid.x": self.full(self.threads),
            **{f"%ctaid.{axis}": self.full(i) for axis, i in zip("xyz", block, strict=True)},
            **{f"%nctaid.{axis}": self.full(i) for axis, i in zip("xyz", grid, strict=True)},
        }
        self.shared = np.full(self.shared_bytes, 0xFF, np.uint8)
        self.written = np.zeros(self.shared_bytes, bool)
        self.unwritten = 0
        self.copies: list[list[Callable[[], None]]] = []
        self.copy_group: list[Callable[[], None]] = []
        self.products: list[list[Callable[[], None]]] = []
        self.product_group: list[Callable[[], None]] = []
        everyone, at = np.ones(self.threads, bool), 0
        while at < len(self.program.instructions):
            instruction = self.program.instructions[at]
            at += 1
            on = everyone
            if instruction.guard is not None:
                on = self.get(instruction.guard[0]).astype(bool) ^ instruction.guard[1]
            try:
                if instruction.op[0] in ("bra", "ret", "exit"):
                    if on.any() and not on.all():
                        raise PtxError("a branch that only a part of the threads takes")
                    if on.any() and instruction.op[0] != "bra":
                        break
                    if on.any():
                        assert isinstance(instruction.operands[-1], Register)
                        at = self.program.labels[instruction.operands[-1].name]
                    continue
                self._execute(instruction, on)
            except (PtxError, UnknownInstruction) as error:
                raise type(error)(f"{error} in block {block}: {instruction.text[:200]}") from None
        if self.product_group or self.products:
            raise PtxError("the kernel ended with products in flight")
        if self.unwritten:
            raise PtxError(f"{self.unwritten} bytes of shared memory read before they were written")

    def _execute(self, instruction: Instruction, on: np.ndarray) -> None:
        op, a = instruction.op, instruction.operands
        handler = self.handlers.get(op[0])
        if handler is not None:
            handler(op, a, on)
            return
        value = evaluate(op, [self.get(x) for x in a[1:]])
        self.set(a[0], value, on)
