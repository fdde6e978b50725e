"""Layers whose weight the code around them reads, instead of calling them: they have to stay dense.

Mamba's fused kernels take ``self.x_proj.weight``, Gemma 3n clamps weights while it trains, and
``torch.nn.MultiheadAttention`` multiplies by the weight of its ``out_proj``. The source of a
module's class says so before the first token comes.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from nf4.tools.caches import forgettable

# torch.nn.MultiheadAttention reads the weight of its out_proj
READ_BY_ATTENTION = nn.modules.linear.NonDynamicallyQuantizableLinear
# What a 4-bit weight answers as a dense one does
_ANSWERED = {"device", "dim", "dtype", "ndim", "numel", "requires_grad", "shape", "size"}
# Methods that look at weights before or after a model computes
_APART = (
    "init",
    "load_from",
    "load_pretrained",
    "reset",
    "resize",
    "tie",
    "fix_init",
    "fuse",
    "quantize",
    "set_",
    "prune",
)
# Libraries whose own modules are not looked at, and where one of them has models
_LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.")
_MODELS = "transformers.models."
# What no one computes with since it has a name: a branch of BLOOM's for tests
_NEVER_TAKEN = "slow_but_exact"


def read_layers(model: nn.Module) -> dict[int, str]:
    """Return the names of the classes that read a layer's weight, by the layer's id."""
    found = {
        id(m): "MultiheadAttention" for m in model.modules() if isinstance(m, READ_BY_ATTENTION)
    }
    for module in model.modules():
        paths = _weights_read_by(type(module))  # type: ignore[arg-type]
        ends = tuple(path for path in paths if path.startswith("."))
        for name, child in module.named_modules(remove_duplicate=False) if paths else ():
            if name in paths or f".{name}".endswith(ends):
                found[id(child)] = type(module).__name__
    return found


@forgettable
@functools.cache
def _weights_read_by(kind: type) -> tuple[str, ...]:
    """Return the paths of layers, from a module of a class, whose weight its methods read.

    A path that starts with a dot is the end of one: of a layer of whatever module is at hand.
    """
    found: set[str] = set()
    over: dict[str, str] = {}  # sources of methods, by name, that stand in front of a base's
    for base in kind.__mro__:
        if base.__module__.startswith(_LIBRARIES) and not base.__module__.startswith(_MODELS):
            continue
        for name, method in vars(base).items():
            if not inspect.isfunction(method) or name.lstrip("_").startswith(_APART):
                continue
            if name in over and "super()" not in over[name]:
                continue
            over[name] = _source(inspect.unwrap(method))
            found.update(_paths(over[name]))
    return tuple(sorted(found))


def _paths(source: str) -> Iterator[str]:
    """Yield the paths that a method reads a weight of, as `_path` has them."""
    if ".weight" not in source:
        return
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:  # a lambda in the middle of a line
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if _is_answered(node):
            continue
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        if isinstance(node, ast.Attribute) and node.attr == "weight" and not stored:
            path = _path(node.value)
            if path:
                yield path
        if isinstance(node, ast.If | ast.IfExp) and _NEVER_TAKEN in ast.unparse(node.test):
            others = node.orelse if isinstance(node.orelse, list) else [node.orelse]
            waiting += others
            continue
        waiting += ast.iter_child_nodes(node)


def _source(method: Any) -> str:
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):  # made at run time, or in C
        return ""


def _is_answered(node: ast.AST) -> bool:
    """Return whether a 4-bit weight answers as a dense one does: ``weight.dtype``, and its type."""
    if isinstance(node, ast.Attribute) and node.attr in _ANSWERED:
        return isinstance(node.value, ast.Attribute) and node.value.attr == "weight"
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return called and node.func.id in ("hasattr", "isinstance", "type")  # type: ignore[attr-defined]


def _path(node: ast.AST) -> str:
    """Return ``a.b`` for ``self.a.b``, ``.a.b`` for that of another name, and nothing else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or not parts:
        return ""
    return ("" if node.id == "self" else ".") + ".".join(parts)
