"""The tensor-core instructions of sm_80 to sm_90: mma.sync, wgmma, ldmatrix and stmatrix.

Products are taken in fp32 by numpy, in an order of its own: results agree with a GPU's up to fp32
rounding. Fragment layouts are those of the PTX manual, section 9.7.14.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from ptx_values import U, UnknownInstruction, from_float, to_float

if TYPE_CHECKING:
    from ptx_machine import Machine

_SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # a descriptor's code: bytes of a swizzled row
_SWIZZLE_MASK = {1: 7, 2: 3, 3: 1}


def _kind(op: list[str]) -> str:
    """Return the type of the factors, f16 or bf16; sums must be fp32."""
    kinds = [part for part in op if part in ("f16", "bf16", "f32", "tf32")]
    if sorted(set(kinds)) not in (["bf16", "f32"], ["f16", "f32"]) or kinds[0] != "f32":
        raise UnknownInstruction(".".join(op))
    return kinds[1]


def _fragment_a(registers: list[Any], threads: Any, kind: str, row: Any, rows: int) -> np.ndarray:
    """Return the left factor ``[rows, 16]`` that lanes hold in four registers of two values."""
    out, lane = np.zeros((rows, 16), np.float32), threads % 32
    for i, register in enumerate(registers):
        at = row + lane // 4 + 8 * (i & 1)
        column = 2 * (lane % 4) + 8 * (i >> 1)
        out[at, column] = to_float(register[threads] & U(0xFFFF), kind)
        out[at, column + 1] = to_float(register[threads] >> U(16), kind)
    return out


class TensorCores:
    """Handlers of a `Machine`."""

    def _matrix(self: Machine, op: list[str], a: list[Any], on: np.ndarray) -> None:
        """Load or store 8x8 matrices of 16 bits, one row address a lane."""
        load, transposed = op[0] == "ldmatrix", "trans" in op
        address = self.address(a[1] if load else a[0])
        row, column = self.lane // 4, 2 * (self.lane % 4)
        thread = np.arange(self.threads)
        for i, name in enumerate(self.vector(a[0] if load else a[1])):
            rows = address[self.warp_base[:, None] + 8 * i + np.arange(8)]
            if (rows % U(16)).any():
                raise UnknownInstruction("a matrix row that is not aligned to 16 bytes")
            if transposed:
                first = rows[thread, column] + (2 * row).astype(U)
                second = rows[thread, column + 1] + (2 * row).astype(U)
            else:
                first = rows[thread, row] + (2 * column).astype(U)
                second = first + U(2)
            if load:
                low, high = (self.from_bytes(self.load_shared(x, 2, on)) for x in (first, second))
                self.set(name, low | (high << U(16)), on, 32)
            else:
                value = self.get(name)
                self.store_shared(first, self.to_bytes(value, 2), on)
                self.store_shared(second, self.to_bytes(value >> U(16), 2), on)

    def _mma(self: Machine, op: list[str], a: list[Any], on: np.ndarray) -> None:
        """Multiply ``[16, 16]`` by ``[16, 8]`` in each warp."""
        if not {"m16n8k16", "row", "col"} <= set(op):
            raise UnknownInstruction(".".join(op))
        kind = _kind(op)
        left, right = ([self.get(x) for x in self.vector(v)] for v in a[1:3])
        out = [to_float(self.get(x), "f32").copy() for x in self.vector(a[3])]
        for warp in range(self.threads // 32):
            threads = np.arange(32) + 32 * warp
            lane = threads % 32
            b = np.zeros((16, 8), np.float32)
            for i in range(2):
                row = 2 * (lane % 4) + 8 * i
                b[row, lane // 4] = to_float(right[i][threads] & U(0xFFFF), kind)
                b[row + 1, lane // 4] = to_float(right[i][threads] >> U(16), kind)
            product = _fragment_a(left, threads, kind, 0, 16) @ b
            for i in range(4):
                out[i][threads] += product[lane // 4 + 8 * (i >> 1), 2 * (lane % 4) + (i & 1)]
        for name, value in zip(self.vector(a[0]), out, strict=True):
            self.set(name, from_float(value, "f32"), on)

    def _shared_factor(
        self: Machine, descriptor: int, rows: int, transposed: bool, kind: str
    ) -> np.ndarray:
        """Read the ``[rows, 16]`` matrix that a wgmma descriptor points at."""
        start, lead, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        swizzle = descriptor >> 62
        span = _SWIZZLE_BYTES[swizzle]
        r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
        if transposed:
            per_span = span // 2
            offset = (r % per_span) * 2 + (k % 8) * span
            offset = offset + (k // 8) * stride + (r // per_span) * lead
        else:
            offset = (r // 8) * stride + (r % 8) * span
            offset = offset + (k * 2 if swizzle else (k // 8) * lead + (k % 8) * 2)
        address = start + offset
        if swizzle:
            address = address ^ (((address >> 7) & _SWIZZLE_MASK[swizzle]) << 4)
        everyone = np.ones(address.size, bool)
        index = self._shared_index(address.ravel().astype(U), 2, everyone)
        self.unwritten += int((~self.written[index]).sum())
        pairs = self.shared[index].astype(U)
        return to_float(pairs[:, 0] | (pairs[:, 1] << U(8)), kind).reshape(rows, 16)

    def _wgmma(self: Machine, op: list[str], a: list[Any], on: np.ndarray) -> None:
        """Multiply ``[64, 16]`` by ``[16, n]`` in each group of four warps, at the next wait."""
        if op[1] == "fence":
            return
        if op[1] == "commit_group":
            self.products.append(self.product_group)
            self.product_group = []
            return
        if op[1] == "wait_group":
            self.drain(self.products, int(self.get(a[0])[0]))
            return
        shape = re.search(r"m64n(\d+)k16", ".".join(op))
        if op[1] != "mma_async" or shape is None:
            raise UnknownInstruction(".".join(op))
        n, kind, from_registers = int(shape[1]), _kind(op), isinstance(a[1], tuple)
        left = [self.get(x) for x in self.vector(a[1])]
        right, keep = self.get(a[2]), self.get(a[3]).astype(bool)
        left_sign, right_sign, *transposed = (int(self.get(x).astype(np.int64)[0]) for x in a[4:])

        def multiply() -> None:
            for group in range(self.threads // 128):
                threads = np.arange(128) + 128 * group
                lane, warp = threads % 32, threads // 32 % 4
                if (right[threads] != right[threads[0]]).any():
                    raise UnknownInstruction("a descriptor that differs within a warp group")
                if from_registers:
                    x = _fragment_a(left, threads, kind, 16 * warp, 64)
                else:
                    x = self._shared_factor(int(left[0][threads[0]]), 64, bool(transposed[0]), kind)
                last = bool(transposed[-1]) if transposed else False
                y = self._shared_factor(int(right[threads[0]]), n, last, kind)
                product = (x * left_sign) @ (y * right_sign).T
                i = np.arange(n // 2)[:, None]
                row = (16 * warp + lane // 4)[None] + 8 * (i // 2 % 2)
                column = 8 * (i // 4) + 2 * (lane % 4)[None] + i % 2
                for j, name in enumerate(self.vector(a[0])):
                    value = self.registers.get(name.name, self.full(0)).copy()
                    old = to_float(value[threads], "f32") if keep[threads[0]] else np.float32(0)
                    value[threads] = from_float(old + product[row, column][j], "f32")
                    self.registers[name.name] = value

        self.product_group.append(multiply)
