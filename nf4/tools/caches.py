"""What is remembered of earlier calls, and how to forget all of it."""

from collections.abc import Callable
from typing import Protocol, TypeVar


class _Cached(Protocol):
    def cache_clear(self) -> None: ...


Cached = TypeVar("Cached", bound=_Cached)
_forgetting: list[Callable[[], object]] = []


def forgettable(cached: Cached) -> Cached:
    """Let `forget` clear what ``functools.lru_cache`` keeps of a function."""
    _forgetting.append(cached.cache_clear)
    return cached


def at_forget(function: Callable[[], object]) -> None:
    """Let `forget` call a function too."""
    _forgetting.append(function)


def forget() -> None:
    """Forget what earlier calls have left: choices, prepared launches, tables, scratch memory.

    What was measured is read again, and compiled kernels are found in their files.
    """
    for function in _forgetting:
        function()
