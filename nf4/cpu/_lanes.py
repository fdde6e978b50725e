"""Look up 4-bit codes in tables of sixteen, many at a time, which numba's compiler does not find.

Each function writes LLVM's intermediate code. A look-up is one permutation where the CPU has
AVX-512, four instructions with AVX2, and plain loads elsewhere; the results are the same.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

FP32, BF16, FP16 = 0, 1, 2  # dtypes, as the compiled functions are told them
CHUNK = 16  # bytes decoded at a time: the smallest block
_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_LANES = 16


def _vector(element: ir.Type, lanes: int = _LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _all(value: int, element: ir.Type = _I32, lanes: int = _LANES) -> ir.Constant:
    """Return a vector of equal integers."""
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Return where an element of a contiguous array lies."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _load(builder: Any, pointer: Any, kind: ir.Type, align: int = 4) -> Any:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)


def _store(builder: Any, value: Any, pointer: Any, align: int) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def _shuffle(builder: Any, one: Any, other: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(_vector(_I32, len(lanes)), list(lanes))
    return builder.shuffle_vector(one, other, mask)


def _call(builder: Any, name: str, *args: Any) -> Any:
    """Call an instruction of LLVM's whose result has the type of its first argument."""
    kinds = [a.type for a in args]
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kinds[0], kinds), name
    )
    return builder.call(function, args)


def _table(context: Any, builder: Any, entries: Any) -> Any:
    """Return a function that looks up sixteen entries of a table at a time.

    Args:
        context: of the compiler.
        builder: of the function.
        entries: the table, <16 x i32>.

    Returns:
        Takes an index, <16 x i32> as `_nibbles` returns, and returns <16 x i32>.
    """
    if _has(context, "avx512f"):
        return lambda index: _call(builder, "llvm.x86.avx512.permvar.si.512", entries, index)
    if _has(context, "avx2"):
        return lambda index: _by_halves(builder, entries, index)
    memory = cgutils.alloca_once_value(builder, entries)
    first = builder.bitcast(memory, _I32.as_pointer())
    return lambda index: _by_loads(builder, first, index)


def _by_halves(builder: Any, entries: Any, index: Any) -> Any:
    """Look up eight lanes at a time, in both halves of the table."""
    low, high = (_shuffle(builder, entries, entries, range(i, i + 8)) for i in (0, 8))
    found = []
    for i in (0, 8):
        lanes = _shuffle(builder, index, index, range(i, i + 8))
        lower, upper = (_call(builder, "llvm.x86.avx2.permd", half, lanes) for half in (low, high))
        found.append(
            builder.select(builder.icmp_unsigned(">", lanes, _all(7, lanes=8)), upper, lower)
        )
    return _shuffle(builder, found[0], found[1], range(16))


def _by_loads(builder: Any, first: Any, index: Any) -> Any:
    """Look up a lane at a time, in memory."""
    found = ir.Constant(_vector(_I32), ir.Undefined)
    for lane in range(_LANES):
        position = ir.Constant(_I32, lane)
        entry = builder.load(builder.gep(first, [builder.extract_element(index, position)]))
        found = builder.insert_element(found, entry, position)
    return found


def _rounded(builder: Any, values: Any, dtype: int) -> Any:
    """Return the bits of fp32 numbers rounded to a dtype, to nearest even, and kept in fp32."""
    bits = builder.bitcast(values, _vector(_I32))
    if dtype == FP32:
        return bits
    shift = 16 if dtype == BF16 else 13
    odd = builder.and_(builder.lshr(bits, _all(shift)), _all(1))
    half = builder.add(odd, _all((1 << shift - 1) - 1))
    rounded = builder.and_(builder.add(bits, half), _all(-(1 << shift)))
    if dtype == FP16:
        rounded = _within_fp16(builder, bits, rounded)
    return builder.select(builder.fcmp_unordered("uno", values, values), _all(0x7FC00000), rounded)


def _within_fp16(builder: Any, bits: Any, rounded: Any) -> Any:
    """Return what rounding to 11 bits gave, with the range of fp16: infinities and subnormals."""
    sign, floats = builder.and_(bits, _all(-(1 << 31))), _vector(_F32)
    size = builder.bitcast(builder.and_(bits, _all((1 << 31) - 1)), floats)
    # A multiple of 2**-24, as numbers around 3/4 are
    around = ir.Constant(floats, [0.75] * _LANES)
    small = builder.bitcast(builder.fsub(builder.fadd(size, around), around), _vector(_I32))
    for compare, limit, found in (("<", 2.0**-14, small), (">=", 65520.0, _all(0x7F800000))):
        beyond = builder.fcmp_ordered(compare, size, ir.Constant(floats, [limit] * _LANES))
        rounded = builder.select(beyond, builder.or_(found, sign), rounded)
    return rounded


def _has(context: Any, feature: str) -> bool:
    """Return whether the CPU that is compiled for has some instructions."""
    return f"+{feature}" in context.codegen()._tm_features.split(",")


def _nibbles(context: Any, builder: Any, bytes_: Any) -> tuple[Any, Any]:
    """Return the high and the low nibbles of sixteen bytes as indices of `_table`."""
    wide = builder.zext(_load(builder, bytes_, _vector(_I8), align=1), _vector(_I32))
    # A permutation of AVX-512 reads the lowest four bits only
    low = wide if _has(context, "avx512f") else builder.and_(wide, _all(15))
    return builder.lshr(wide, _all(4)), low


def _check_arrays(*arrays: tuple[Any, Any]) -> None:
    """Raise unless each is a contiguous array of its kind."""
    for found, dtype in arrays:
        if not (isinstance(found, types.Array) and found.layout == "C" and found.dtype == dtype):
            raise TypingError(f"expected a contiguous array of {dtype}, got {found}")


def _splat(builder: Any, value: Any) -> Any:
    """Return a vector of one number."""
    nothing = ir.Constant(_vector(_F32), ir.Undefined)
    single = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, single, _all(0))


@intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """Return an address as a pointer, for ``numba.carray``."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@intrinsic
def expand_block(typing_context, levels, scale, dtype, packed, p, half, out, o):  # type: ignore[no-untyped-def]
    """Write the elements of a block of ``half`` bytes packed[p:] to out[o:].

    They are levels times scale, rounded to a dtype: a literal, FP32, BF16 or FP16. Levels are fp32,
    out is fp32, or uint16 for the bits of bf16.
    """
    _check_arrays((levels, types.float32), (packed, types.uint8))
    _check_arrays((out, types.uint16 if out.dtype == types.uint16 else types.float32))
    if not isinstance(dtype, types.IntegerLiteral):
        raise TypingError("dtype: expected a literal")
    to_16 = out.dtype == types.uint16

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds, zero = signature.args, context.get_constant(types.intp, 0)
        table = _load(builder, _pointer(context, builder, kinds[0], args[0], zero), _vector(_F32))
        values = builder.fmul(table, _splat(builder, args[1]))
        entries = _rounded(builder, values, dtype.literal_value)
        if to_16:
            entries = builder.lshr(entries, _all(16))
        look_up = _table(context, builder, entries)
        source = _pointer(context, builder, kinds[3], args[3], args[4])
        target = _pointer(context, builder, kinds[6], args[6], args[7])
        chunks = builder.udiv(args[5], context.get_constant(types.intp, CHUNK))
        with cgutils.for_range(builder, chunks, intp=_I64) as chunk:
            at = builder.mul(chunk.index, context.get_constant(types.intp, CHUNK))
            high, low = _nibbles(context, builder, builder.gep(source, [at]))
            place = builder.gep(target, [builder.shl(at, ir.Constant(_I64, 1))])
            if to_16:
                pairs = builder.or_(look_up(high), builder.shl(look_up(low), _all(16)))
                _store(builder, pairs, place, align=2)
            else:
                for i in (0, 8):  # high and low in turn, eight of each
                    pairs = [lane + 16 * which for lane in range(i, i + 8) for which in (0, 1)]
                    found = look_up(_shuffle(builder, high, low, pairs))
                    _store(builder, found, builder.gep(place, [ir.Constant(_I64, 2 * i)]), align=4)
        return context.get_dummy_value()

    kinds = (levels, types.float32, dtype, packed, types.intp, types.intp, out, types.intp)
    return types.void(*kinds), generate


@intrinsic
def encode_block(typing_context, x, scale, thresholds, half, packed, p):  # type: ignore[no-untyped-def]
    """Write the codes of x[: 2 * half] times scale to the ``half`` bytes packed[p:].

    A code is the number of thresholds below, of fifteen and an infinity; all numbers are fp32.
    """
    fp32 = types.float32
    _check_arrays((x, fp32), (thresholds, fp32), (packed, types.uint8))

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds, zero = signature.args, context.get_constant(types.intp, 0)
        source, table = (_pointer(context, builder, kinds[i], args[i], zero) for i in (0, 2))
        target = _pointer(context, builder, kinds[4], args[4], args[5])
        look_up = _table(context, builder, _load(builder, table, _vector(_I32)))
        scales = _splat(builder, args[1])
        chunks = builder.udiv(args[3], context.get_constant(types.intp, CHUNK))
        with cgutils.for_range(builder, chunks, intp=_I64) as chunk:
            at = builder.mul(chunk.index, context.get_constant(types.intp, CHUNK))
            first = builder.gep(source, [builder.shl(at, ir.Constant(_I64, 1))])
            second = builder.gep(first, [ir.Constant(_I64, _LANES)])
            one, other = (_load(builder, place, _vector(_F32)) for place in (first, second))
            codes = []
            for i in (0, 1):  # the even elements, then the odd ones
                scaled = builder.fmul(_shuffle(builder, one, other, range(i, 32, 2)), scales)
                codes.append(_count_below(builder, look_up, scaled))
            bytes_ = builder.or_(builder.shl(codes[0], _all(4)), codes[1])
            place = builder.gep(target, [at])
            _store(builder, builder.trunc(bytes_, _vector(_I8)), place, align=1)
        return context.get_dummy_value()

    kinds = (x, fp32, thresholds, types.intp, packed, types.intp)
    return types.void(*kinds), generate


def _count_below(builder: Any, look_up: Any, values: Any) -> Any:
    """Return how many of sixteen sorted thresholds lie below each value, halving four times."""
    count = _all(0)
    for step in (8, 4, 2, 1):
        tried = builder.bitcast(look_up(builder.add(count, _all(step - 1))), _vector(_F32))
        above = builder.fcmp_ordered(">", values, tried)
        count = builder.select(above, builder.add(count, _all(step)), count)
    return count


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, in one instruction where the CPU has one."""
    lanes = a.type.count
    return _call(builder, f"llvm.fmuladd.v{lanes}f32", a, b, c)


def _sum(builder: Any, vector: Any) -> ir.Value:
    """Return the sum of sixteen lanes, halved four times."""
    for width in (8, 4, 2, 1):
        lower, upper = (_shuffle(builder, vector, vector, range(i, i + width)) for i in (0, width))
        vector = builder.fadd(lower, upper)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


@intrinsic
def dot_row(typing_context, levels, packed, p, absmax, a, blocks, half, even, odd, k, group, sums):  # type: ignore[no-untyped-def]
    """Write the products of a row of W with a few rows of x to sums[0:group].

    The row's bytes begin at packed[p], its scales at absmax[a]; a block is ``half`` bytes. Even and
    odd hold ``group`` rows of k elements of x each, those that the high and low nibbles meet;
    group is a literal.
    """
    fp32 = types.float32
    _check_arrays((levels, fp32), (packed, types.uint8), (absmax, fp32), (even, fp32), (odd, fp32))
    if not isinstance(group, types.IntegerLiteral):
        raise TypingError("group: expected a literal")
    rows = group.literal_value

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds, intp = signature.args, context.get_constant
        start = [_pointer(context, builder, kinds[i], args[i], args[i + 1]) for i in (1, 3)]
        origin = intp(types.intp, 0)
        table, x_even, x_odd, target = (
            _pointer(context, builder, kinds[i], args[i], origin) for i in (0, 7, 8, 11)
        )
        look_up = _table(context, builder, _load(builder, table, _vector(_I32)))
        zero = ir.Constant(_vector(_F32), [0.0] * _LANES)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(2 * rows)]

        def add_chunk(at: Any, sums: list[Any], scales: Any = None) -> list[Any]:
            """Return sums plus the products of 16 bytes, times scales if given."""
            for i, code in enumerate(_nibbles(context, builder, builder.gep(start[0], [at]))):
                w = builder.bitcast(look_up(code), _vector(_F32))
                w = w if scales is None else builder.fmul(w, scales)
                for row in range(rows):
                    where = builder.add(at, builder.mul(args[9], intp(types.intp, row)))
                    x = _load(builder, builder.gep((x_even, x_odd)[i], [where]), _vector(_F32))
                    sums[2 * row + i] = _multiply_add(builder, w, x, sums[2 * row + i])
            return sums

        def add_block(block: Any, chunks: int | None) -> None:
            """Add a block of so many chunks, unrolled, or of any number."""
            scale = _load(builder, builder.gep(start[1], [block]), _F32)
            scales, begin = _splat(builder, scale), builder.mul(block, args[6])
            if chunks is not None and rows == 1:  # scaled as a whole: fewer products
                sums = [zero, zero]
                for i in range(chunks):
                    sums = add_chunk(builder.add(begin, intp(types.intp, i * CHUNK)), sums)
                for total, found in zip(totals, sums, strict=True):
                    added = _multiply_add(builder, found, scales, builder.load(total))
                    builder.store(added, total)
                return
            count = builder.udiv(args[6], intp(types.intp, CHUNK))
            with cgutils.for_range(builder, count, intp=_I64) as chunk:
                at = builder.add(begin, builder.mul(chunk.index, intp(types.intp, CHUNK)))
                found = add_chunk(at, [builder.load(total) for total in totals], scales)
                for total, value in zip(totals, found, strict=True):
                    builder.store(value, total)

        usual = builder.icmp_signed("==", args[6], intp(types.intp, 2 * CHUNK))
        with builder.if_else(usual) as (then, otherwise):
            for branch, chunks in ((then, 2), (otherwise, None)):
                with branch, cgutils.for_range(builder, args[5], intp=_I64) as block:
                    add_block(block.index, chunks)
        for row in range(rows):
            both = builder.fadd(*(builder.load(t) for t in totals[2 * row : 2 * row + 2]))
            place = builder.gep(target, [ir.Constant(_I64, row)])
            builder.store(_sum(builder, both), place)
        return context.get_dummy_value()

    kinds = (levels, packed, types.intp, absmax, types.intp, types.intp, types.intp)
    return types.void(*kinds, even, odd, types.intp, group, sums), generate


@intrinsic
def outer_sums(typing_context, a, r, b, k, p, m, group, out, o, n):  # type: ignore[no-untyped-def]
    """Write sums over m rows of a.T @ b: of ``group`` columns of a and 32 columns of b.

    The columns of a, fp32 with r columns in all, begin at a[0]; those of b, bf16 by twos in uint32
    with k words a row, at b[p]. Row q of the result, fp32, begins at out[o + q * n]; group is a
    literal.
    """
    _check_arrays((a, types.float32), (b, types.uint32), (out, types.float32))
    if not isinstance(group, types.IntegerLiteral):
        raise TypingError("group: expected a literal")
    rows = group.literal_value

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kinds, intp = signature.args, context.get_constant
        left = _pointer(context, builder, kinds[0], args[0], intp(types.intp, 0))
        right = _pointer(context, builder, kinds[2], args[2], args[4])
        zero = ir.Constant(_vector(_F32), [0.0] * _LANES)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(2 * rows)]
        with cgutils.for_range(builder, args[5], intp=_I64) as row:
            words = _load(
                builder, builder.gep(right, [builder.mul(row.index, args[3])]), _vector(_I32)
            )
            halves = builder.shl(words, _all(16)), builder.and_(words, _all(-(1 << 16)))
            columns = [builder.bitcast(half, _vector(_F32)) for half in halves]
            start = builder.gep(left, [builder.mul(row.index, args[1])])
            for q in range(rows):
                scale = _splat(builder, builder.load(builder.gep(start, [ir.Constant(_I64, q)])))
                for column, total in zip(columns, totals[2 * q : 2 * q + 2], strict=True):
                    value = _multiply_add(builder, column, scale, builder.load(total))
                    builder.store(value, total)
        for q in range(rows):
            even, odd = (builder.load(total) for total in totals[2 * q : 2 * q + 2])
            place = builder.add(args[8], builder.mul(args[9], intp(types.intp, q)))
            target = _pointer(context, builder, kinds[7], args[7], place)
            for i in (0, 8):
                pairs = [lane + 16 * which for lane in range(i, i + 8) for which in (0, 1)]
                found = _shuffle(builder, even, odd, pairs)
                _store(builder, found, builder.gep(target, [ir.Constant(_I64, 2 * i)]), align=4)
        return context.get_dummy_value()

    sizes = types.intp
    return types.void(a, sizes, b, sizes, sizes, sizes, group, out, sizes, sizes), generate
