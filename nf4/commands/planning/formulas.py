"""Formulas that are computed as they are printed: text, and the values of the names in it."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"ceil": math.ceil, "max": max}


def evaluate(formula: str, values: Mapping[str, float]) -> float:
    """Return what a formula comes to.

    Args:
        formula: of names, numbers, ``+ - * /``, parentheses, ``ceil()`` and ``max()``.
        values: of the names.

    Raises:
        ValueError: the formula has a name without a value, or anything else in it.
    """
    return float(_value(ast.parse(formula, mode="eval").body, values))


def _value(node: ast.expr, values: Mapping[str, float]) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        made = _OPERATORS[type(node.op)](_value(node.left, values), _value(node.right, values))
        return float(made)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in _FUNCTIONS:
        found = _FUNCTIONS[ast.unparse(node.func)](*(_value(a, values) for a in node.args))
        return float(found)
    raise ValueError(f"formula: expected names, numbers and + - * /, got {ast.unparse(node)!r}")


@dataclass(frozen=True)
class Term:
    """A name in formulas.

    Attributes:
        name: of it.
        value: what it stands for.
        meaning: in words, with the unit.
        formula: what it is computed by; empty for what is given.
    """

    name: str
    value: float
    meaning: str
    formula: str = ""


class Sheet:
    """The names of formulas, in the order in which they were given a value."""

    def __init__(self) -> None:
        self.terms: dict[str, Term] = {}

    def give(self, name: str, value: float, meaning: str) -> None:
        """Give a name a value."""
        self.terms[name] = Term(name, value, meaning)

    def define(self, name: str, formula: str, meaning: str) -> None:
        """Give a name the value of a formula."""
        self.terms[name] = Term(name, self.value(formula), meaning, formula)

    def value(self, formula: str) -> float:
        """Return what a formula comes to."""
        return evaluate(formula, {name: term.value for name, term in self.terms.items()})
