"""Values of PTX registers as numpy arrays, and the instructions that only compute.

A register is a uint64 array with one entry a thread; of a narrow one only the low bits count. A
predicate is a bool array. Arithmetic is IEEE's, rounded to nearest even unless the opcode says
otherwise. Instruction set: https://docs.nvidia.com/cuda/parallel-thread-execution/.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

U = np.uint64
BITS = {
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "bf16x2", "f16x2"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 64),
    "pred": 1,
}
FLOATS = ("f16", "bf16", "f32", "f64")


class UnknownInstruction(Exception):
    """An instruction that this emulator does not know: the test must not pass."""


def low_bits(value: Any, bits: int) -> np.ndarray:
    """Keep the low bits."""
    value = np.asarray(value).astype(U)
    return value if bits == 64 else value & U((1 << bits) - 1)


def signed(value: Any, bits: int) -> np.ndarray:
    """Read the low bits as a signed integer, int64."""
    value = low_bits(value, bits)
    if bits == 64:
        return value.astype(np.int64)
    sign = U(1 << (bits - 1))
    return (value ^ sign).astype(np.int64) - np.int64(1 << (bits - 1))


def from_float(x: Any, kind: str) -> np.ndarray:
    """Round float64 or float32 values to a PTX float, and return its bits."""
    if kind == "f64":
        return np.ascontiguousarray(x, np.float64).view(U)
    if kind == "f16":
        return np.ascontiguousarray(x).astype(np.float16).view(np.uint16).astype(U)
    single = np.ascontiguousarray(x).astype(np.float32)
    bits = single.view(np.uint32).astype(U)
    if kind == "f32":
        return bits
    rounded = (bits + U(0x7FFF) + ((bits >> U(16)) & U(1))) >> U(16)
    return np.where(np.isnan(single), U(0x7FFF), rounded & U(0xFFFF))


def to_float(bits: Any, kind: str) -> np.ndarray:
    """Read bits as a PTX float: float32, or float64 for f64."""
    bits = np.asarray(bits).astype(U)
    if kind == "f64":
        return np.ascontiguousarray(bits).view(np.float64)
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    if kind == "bf16":
        bits = low_bits(bits, 16) << U(16)
    return low_bits(bits, 32).astype(np.uint32).view(np.float32)


def read(bits: Any, kind: str) -> np.ndarray:
    """Read a register as a PTX type: a float, a signed or an unsigned integer."""
    if kind in FLOATS:
        return to_float(bits, kind)
    return signed(bits, BITS[kind]) if kind[0] == "s" else low_bits(bits, BITS[kind])


def prmt(a: Any, b: Any, selector: Any) -> np.ndarray:
    """Pick four of the eight bytes of (a, b); bit 3 of a selector's nibble spreads the sign."""
    pool = low_bits(a, 32) | (low_bits(b, 32) << U(32))
    out = np.zeros_like(pool)
    for i in range(4):
        pick = (selector >> U(4 * i)) & U(15)
        byte = (pool >> ((pick & U(7)) * U(8))) & U(255)
        sign = np.where(byte & U(128), U(255), U(0))
        out |= np.where(pick & U(8), sign, byte) << U(8 * i)
    return out


def lop3(a: Any, b: Any, c: Any, table: int) -> np.ndarray:
    """Combine three words bit by bit as an 8-entry truth table says."""
    out = np.zeros_like(low_bits(a, 32))
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return low_bits(out, 32)


_COMPARE: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("eq", "equ"), np.equal),
    **dict.fromkeys(("ne", "neu"), np.not_equal),
    **dict.fromkeys(("lt", "lo", "ltu"), np.less),
    **dict.fromkeys(("le", "ls", "leu"), np.less_equal),
    **dict.fromkeys(("gt", "hi", "gtu"), np.greater),
    **dict.fromkeys(("ge", "hs", "geu"), np.greater_equal),
}


def _compare(op: list[str], a: Any, b: Any) -> np.ndarray:
    a, b = read(a, op[-1]), read(b, op[-1])
    result = _COMPARE[op[1]](a, b)
    if op[-1] in FLOATS:
        nan = np.isnan(a) | np.isnan(b)
        unordered = op[1] in ("equ", "neu", "ltu", "leu", "gtu", "geu")
        result = np.where(nan, unordered, result)
    return result.astype(bool)


def _fma(a: Any, b: Any, c: Any, op: list[str]) -> np.ndarray:
    """Return a * b + c of fp32, rounded once, to nearest or down."""
    with np.errstate(invalid="ignore", over="ignore"):
        product = a.astype(np.float64) * b  # exact: 48 bits
        total = product + c
        back = total - product
        error = (product - (total - back)) + (c - back)  # of the addition, exactly
        # Round the float64 sum to odd, so that rounding it again to 24 bits is right.
        odd = (total.view(np.int64) & 1).astype(bool) | (error == 0) | ~np.isfinite(total)
        total = np.where(odd, total, np.nextafter(total, np.copysign(np.inf, error)))
        result = total.astype(np.float32)
        if "rm" in op:
            above = result > total
            result = np.where(above, np.nextafter(result, np.float32(-np.inf)), result)
        return np.clip(result, np.float32(0), np.float32(1)) if "sat" in op else result


def _extreme(op: list[str], a: Any, b: Any) -> np.ndarray:
    """Return max or min; -0 is below +0, a NaN loses unless the opcode says NaN."""
    larger = op[0] == "max"
    if "NaN" in op:
        result = (np.maximum if larger else np.minimum)(a, b)
    else:
        result = (np.fmax if larger else np.fmin)(a, b)
    zeros = (a == 0) & (b == 0)
    negative = (np.signbit(a) & np.signbit(b)) if larger else (np.signbit(a) | np.signbit(b))
    return np.where(zeros, np.where(negative, -0.0, 0.0), result).astype(result.dtype)


_FLOAT: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "rcp": lambda x: np.float32(1) / x,
    "sqrt": np.sqrt,
    "ex2": np.exp2,
}


def _float(op: list[str], values: Sequence[Any], kind: str) -> np.ndarray:
    known = {op[0], kind, "rn", "NaN", "rm", "sat"}
    if not set(op) <= known or (op[0] == "fma" and kind != "f32"):
        raise UnknownInstruction(".".join(op))
    if op[0] in ("add", "sub", "mul") and "rn" not in op:
        raise UnknownInstruction(f"{'.'.join(op)}, which ptxas may contract to an fma")
    x = [to_float(v, kind) for v in values]
    with np.errstate(all="ignore"):
        if op[0] == "fma":
            return from_float(_fma(*x, op), kind)
        if op[0] in ("max", "min"):
            return from_float(_extreme(op, *x), kind)
        if "rm" in op or "sat" in op or op[0] not in _FLOAT:
            raise UnknownInstruction(".".join(op))
        return from_float(_FLOAT[op[0]](*x), kind)


_ROUND = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}


def _convert(op: list[str], values: Sequence[Any]) -> np.ndarray:
    to, source = op[-2], op[-1]
    if to in ("bf16x2", "f16x2"):
        high, low = (from_float(to_float(v, source), to[:-2]) for v in values)
        return high << U(16) | low
    value = read(values[0], source)
    if to in FLOATS:
        if source in FLOATS and op[1] in _ROUND:
            value = _ROUND[op[1]](value)
        elif source not in FLOATS and to != "f64":
            value = value.astype(np.float64)  # exact up to 2^53, then rounded once
        return from_float(value, to)
    bits = BITS[to]
    if source in FLOATS:
        low, high = (
            (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if to[0] == "s" else (0, 2.0**bits - 1)
        )
        if bits == 64:
            raise UnknownInstruction(".".join(op))
        whole = _ROUND[op[1]](value.astype(np.float64))
        return low_bits(
            np.where(np.isnan(whole), 0, np.clip(whole, low, high)).astype(np.int64), bits
        )
    return low_bits(value, bits)


def _shift(op: list[str], value: Any, by: Any) -> np.ndarray:
    bits = BITS[op[-1]]
    by = np.minimum(low_bits(by, 32), U(bits))
    inside = np.minimum(by, U(63))
    if op[0] == "shl":
        return np.where(by >= bits, U(0), low_bits(value << inside, bits))
    if op[-1][0] == "s":
        return low_bits(signed(value, bits) >> inside.astype(np.int64), bits)
    return np.where(by >= bits, U(0), low_bits(value, bits) >> inside)


def _multiply(op: list[str], values: Sequence[Any]) -> np.ndarray:
    kind, bits = op[-1], BITS[op[-1]]
    a, b = read(values[0], kind), read(values[1], kind)
    if bits == 64 and "lo" not in op:
        raise UnknownInstruction(".".join(op))
    with np.errstate(over="ignore"):
        product = (a * b).astype(U)
        if "hi" in op:
            product = ((a * b) >> a.dtype.type(bits)).astype(U)
        width = 2 * bits if "wide" in op else bits
        return low_bits(product + values[2] if op[0] == "mad" else product, width)


def _divide(op: list[str], a: Any, b: Any) -> np.ndarray:
    a, b = (read(v, op[-1]).astype(np.int64) for v in (a, b))
    quotient = np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)
    return low_bits(quotient if op[0] == "div" else a - quotient * b, BITS[op[-1]])


def _bit_field(op: list[str], values: Sequence[Any]) -> np.ndarray:
    bits = BITS[op[-1]]
    position, length = (v & U(255) for v in values[-2:])
    if op[0] == "bfi":
        field = ((U(1) << length) - U(1)) << position
        return low_bits((values[1] & ~field) | ((values[0] << position) & field), bits)
    value = (low_bits(values[0], bits) >> position) & ((U(1) << length) - U(1))
    if op[-1][0] == "s":
        sign = U(1) << (length - U(1))
        value = (value ^ sign) - sign
    return low_bits(value, bits)


_INTEGER: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: U(0) - a,
}


def evaluate(op: list[str], values: Sequence[np.ndarray]) -> np.ndarray:
    """Return what an instruction computes.

    Args:
        op: the opcode split at its dots, such as ``["add", "s32"]``.
        values: its sources, uint64 or bool arrays.

    Raises:
        UnknownInstruction: the opcode is not known here.
    """
    name, kind = op[0], op[-1]
    if name == "setp":
        if len(op) > 3 and op[2] in ("and", "or", "xor"):
            raise UnknownInstruction(".".join(op))
        return _compare(op, *values)
    if name == "selp":
        return np.where(values[2].astype(bool), values[0], values[1])
    if name == "prmt":
        return prmt(*values)
    if name == "lop3":
        return lop3(*values[:3], int(values[3].flat[0]))
    if name == "cvt":
        return _convert(op, values)
    if kind in ("bf16x2", "f16x2"):
        low, high = (
            _float([*op[:-1], kind[:-2]], [v >> U(s) for v in values], kind[:-2]) for s in (0, 16)
        )
        return high << U(16) | low
    if kind in FLOATS:
        return _float(op, values, kind)
    if kind == "pred":
        bools = [v.astype(bool) for v in values]
        if name == "not":
            return ~bools[0]
        return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name](*bools)
    if name in ("shl", "shr"):
        return _shift(op, *values)
    if name in ("mul", "mad"):
        return _multiply(op, values)
    if name in ("div", "rem"):
        return _divide(op, *values)
    if name in ("bfe", "bfi"):
        return _bit_field(op, values)
    if name in ("min", "max"):
        a, b = (read(v, kind) for v in values)
        return low_bits((np.minimum if name == "min" else np.maximum)(a, b), BITS[kind])
    if name == "abs":
        return low_bits(np.abs(signed(values[0], BITS[kind])), BITS[kind])
    if name == "popc":
        ones = [int(v).bit_count() for v in low_bits(values[0], BITS[kind])]
        return np.array(ones, U)
    if name in _INTEGER:
        return low_bits(_INTEGER[name](*values), BITS[kind])
    raise UnknownInstruction(".".join(op))
