"""Put a function of ours around one of a framework's, once."""

import functools
from collections.abc import Callable
from typing import Any


def wrap_once(owner: Any, name: str, around: Callable[..., Callable[..., Any]]) -> None:
    """Replace an attribute of a class by what is made of it, unless it has been already.

    Args:
        owner: the class.
        name: of a function of it.
        around: returns ours for the framework's.
    """
    shipped = getattr(owner, name)
    if hasattr(shipped, "knows_nf4"):
        return
    ours: Any = functools.wraps(shipped)(around(shipped))
    ours.knows_nf4 = True
    setattr(owner, name, ours)
