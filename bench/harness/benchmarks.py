"""Every function of every case through pytest-benchmark, on its clock.

pytest bench/ --benchmark-only                       every op at its default sizes and a tiny one
pytest bench/ --benchmark-only -k "matmul and tiny"
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch

from nf4.bench.harness import run
from nf4.bench.harness.cases import DEVICE, Case, Options
from nf4.bench.harness.measure import Function, empty_cache
from nf4.bench.harness.request import OPS

ROUNDS = 10


def _sizes() -> Iterator[tuple[str, str, Options]]:
    """Yield a name, an op, and options of one size: for each op a tiny one, then the defaults."""
    for op in OPS:
        module = import_module(f"nf4.bench.bench_{op}")
        full: Options = module.ON_GPU if DEVICE.type == "cuda" else module.DEFAULTS
        few = {axis: getattr(full, axis)[:1] for axis in ("rows", "ranks", "dtypes")}
        for kind, some in (("tiny", replace(full, shapes=[run.SMALL], **few)), ("default", full)):
            for shape, dtype, m, r in product(some.shapes, some.dtypes, some.rows, some.ranks):
                one = replace(some, shapes=[shape], dtypes=[dtype], rows=[m], ranks=[r])
                yield f"{op}-{kind}-{shape[0]}x{shape[1]}-{dtype}-M{m}-r{r}", op, one


SIZES = {name: (op, options) for name, op, options in _sizes()}


def _make(op: str, options: Options) -> list[Case]:
    made = import_module(f"nf4.bench.bench_{op}").make(options)
    return list(made)


@lru_cache
def _functions(op: str, dtype: str) -> list[list[str]]:
    """Return the names of the functions of each case, as a tiny weight tells them."""
    tiny = next(options for name, options in SIZES.values() if name == op)
    return [list(case.functions) for case in _make(op, replace(tiny, dtypes=[dtype]))]


def _parameters() -> Iterator[Any]:
    for name, (op, options) in SIZES.items():
        for i, functions in enumerate(_functions(op, *options.dtypes)):
            for function in functions:
                yield pytest.param(name, i, function, id=f"{name}-{i}-{function}")


@lru_cache(maxsize=1)
def _size(name: str) -> tuple[list[Case], dict[run.Key, dict[str, Function]]]:
    """Return the cases of a size, and the same functions on a tiny weight; the last is kept."""
    op, options = SIZES[name]
    torch.manual_seed(0)
    return _make(op, options), run.small_functions(import_module(f"nf4.bench.bench_{op}"), options)


@pytest.mark.parametrize(("size", "index", "name"), list(_parameters()))
def test_speed(size: str, index: int, name: str, benchmark: Any) -> None:
    """Check a function, and time it; the cache is emptied before each round."""
    cases, smalls = _size(size)
    case = cases[index]
    if name not in case.functions:
        pytest.skip(f"not for this size: {name}")
    one = replace(case, functions={name: case.functions[name]})
    functions, absent = run.usable(one, DEVICE)
    if absent:
        pytest.skip(absent[name])
    function, small = functions[name], smalls.get(run.key_of(case), {}).get(name)

    def call() -> None:
        function()
        _wait()

    def prepare() -> None:
        empty_cache(DEVICE, small)
        _wait()

    labels = ", ".join(f"{k} {v}" for k, v in case.labels.items())
    benchmark.group = f"{SIZES[size][0]}: {labels}"
    benchmark.extra_info.update(moved=case.moved, flops=case.flops)
    benchmark.pedantic(call, setup=prepare, rounds=ROUNDS, warmup_rounds=1)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)
