"""Show PEFT parameters by other names while it looks for some."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def named_otherwise(
    modules: Iterable[nn.Module], named: Callable[..., Iterator[tuple[str, Any]]]
) -> Iterator[None]:
    """Let ``named_parameters`` of modules be another function within a ``with`` block.

    Args:
        modules: which.
        named: called with a module, and with what it was asked.
    """
    held = list(modules)
    for module in held:
        module.named_parameters = partial(named, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in held:
            del module.named_parameters
