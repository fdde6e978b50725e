"""Spread a compiled loop over the threads that PyTorch was told to use.

Where PyTorch's threads are OpenMP's, as on Linux, the loop runs on them: they wait for work without
sleeping, so that a loop of 20 microseconds is worth sharing, and threads of our own would only take
the cores from them. Elsewhere, and after a fork, which those threads do not survive, it runs on a
pool. numba's own parallel loops are not used: they bring another OpenMP, or end after a fork.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ALONE = (1, 0, 0, 0)  # a team of one, which needs no OpenMP
_INT, _I32 = ir.IntType(64), ir.IntType(32)
_POINTER = ir.IntType(8).as_pointer()


def spread(share: Callable[..., Any], items: range, grain: int, *args: Any) -> None:
    """Run a loop over the parts of a range, one part a thread.

    Args:
        share: a compiled function that takes ``(*args, begin, end, team)`` and calls `fork`.
        items: what to go over.
        grain: fewest items worth a thread.
        *args: of it.

    Raises:
        MemoryError: a thread found no memory.
    """
    threads = min(torch.get_num_threads(), len(items) // grain)
    if threads < 2:
        share(*args, items.start, items.stop, ALONE)
        return
    found = _openmp()
    if found is not None:
        # All threads: fewer would end the others, and start them anew for the next product
        share(*args, items.start, items.stop, (torch.get_num_threads(), *found))
        return
    edges = [items.start + len(items) * i // threads for i in range(threads + 1)]
    others = [
        _pool(threads - 1).submit(share, *args, begin, end, ALONE)
        for begin, end in zip(edges[1:], edges[2:], strict=False)
    ]
    share(*args, edges[0], edges[1], ALONE)
    for other in others:
        other.result()


@lru_cache
def _openmp() -> tuple[int, int, int] | None:
    """Return where three functions of PyTorch's OpenMP lie, or None.

    They start a team, tell a thread its number, and how many there are.
    """
    try:
        library = ctypes.CDLL(None)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        found = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]
    except (AttributeError, OSError, TypeError):
        return None
    return found[0] or 0, found[1] or 0, found[2] or 0


@lru_cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="nf4")


def _after_fork() -> None:
    """Forget the threads of the parent, which the child does not have."""
    global _openmp
    _openmp = _none  # type: ignore[assignment]
    _pool.cache_clear()


def _none() -> None:
    return None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@intrinsic
def fork(typing_context, loop, args, begin, end, team):  # type: ignore[no-untyped-def]
    """Call ``loop(*args, begin, end)`` over a part of a range on each thread of an OpenMP team.

    Args:
        typing_context: the compiler's; not given by callers.
        loop: compiled.
        args: tuple.
        begin: of the range.
        end: of the range.
        team: `ALONE`, or the number of threads and what `_openmp` returns.
    """
    kinds = (*args.types, types.intp, types.intp)
    resolved = loop.get_call_type(typing_context, kinds, {})

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        compiled = loop.dispatcher.get_compile_result(resolved)
        context.active_code_library.add_linking_library(compiled.library)
        call = (compiled.fndesc, compiled.signature)
        threads, parallel, me, of = cgutils.unpack_tuple(builder, values[4])
        inside = [*cgutils.unpack_tuple(builder, values[1]), *values[2:4]]
        together = builder.icmp_signed(">", threads, ir.Constant(_INT, 1))
        with builder.if_else(together) as (on_a_team, alone):
            with alone:
                context.call_internal(builder, *call, inside)
            with on_a_team:
                failed = cgutils.alloca_once_value(builder, ir.Constant(_I32, 0))
                held = cgutils.pack_struct(builder, [*values[1:4], me, of, failed])
                data = cgutils.alloca_once_value(builder, held)
                part = _part(context, builder, held.type, call)
                kind = ir.FunctionType(ir.VoidType(), [part.type, _POINTER, _I32, _I32])
                start = builder.inttoptr(parallel, kind.as_pointer())
                rest = builder.trunc(threads, _I32), ir.Constant(_I32, 0)
                builder.call(start, [part, builder.bitcast(data, _POINTER), *rest])
                with cgutils.if_unlikely(
                    builder, cgutils.is_not_null(builder, builder.load(failed))
                ):
                    message = ("nf4: a thread found no memory",)
                    context.call_conv.return_user_exc(builder, MemoryError, message)
        return context.get_dummy_value()

    return types.void(loop, args, types.intp, types.intp, team), generate


def _part(context: Any, builder: Any, kind: ir.Type, call: tuple[Any, Any]) -> ir.Function:
    """Return what each thread of a team runs: its part of the range, as `fork` packed it."""
    name = builder.module.get_unique_name("nf4_part")
    function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
    function.linkage = "internal"
    own = ir.IRBuilder(function.append_basic_block("entry"))
    data = own.load(own.bitcast(function.args[0], kind.as_pointer()))
    args, begin, end, me, of, failed = (own.extract_value(data, i) for i in range(6))
    ask = ir.FunctionType(_I32, []).as_pointer()
    i, n = (own.sext(own.call(own.inttoptr(address, ask), []), _INT) for address in (me, of))
    size = own.sub(end, begin)
    edges = [
        own.add(begin, own.sdiv(own.mul(size, x), n)) for x in (i, own.add(i, ir.Constant(_INT, 1)))
    ]
    items = cgutils.unpack_tuple(own, args)
    status, _ = context.call_internal_no_propagate(own, *call, [*items, *edges])
    with cgutils.if_unlikely(own, status.is_error):
        own.store(ir.Constant(_I32, 1), failed)
    own.ret_void()
    return function
