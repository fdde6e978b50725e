"""Kernels with a mistake put in, to see that the tests notice."""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from ptx_machine import PtxError
from ptx_values import UnknownInstruction

LONGEST = 30  # of a token: what stands around it may change
KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def mutant(op: str, file: str, right: str, wrong: str, folder: Path) -> ModuleType:
    """Return the module of an operator after one replacement.

    Args:
        op: the operator.
        file: the file to change, the operator's own or a helper that it imports.
        right: a short token that the file has once.
        wrong: what takes its place, once.
        folder: where to write; Triton reads a kernel's source from its file.
    """
    changed = {}
    for name in dict.fromkeys((file, op)):
        text = (KERNELS / f"{name}.py").read_text(encoding="utf-8")
        if name == file:
            count = text.count(right)
            assert count == 1, (
                f"{file}: expected {right!r} once, to change it, found it {count} times"
            )
            assert len(right) <= LONGEST, f"{right!r}: expected a token, got a line"
            text = text.replace(right, wrong)
        else:
            text = text.replace(f"from .{file} ", f"from .{file}_mutant ")
        changed[name] = text
    for name, text in changed.items():
        path = folder / f"{name}_mutant.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"nf4.kernels.{name}_mutant", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module


def is_noticed(check: Callable[..., None], cases: Iterable[tuple[Any, ...]]) -> bool:
    """Return whether a check fails on one of the cases, or the emulator on its way there."""
    for case in cases:
        try:
            check(*case)
        except (AssertionError, PtxError, UnknownInstruction):
            return True
    return False
