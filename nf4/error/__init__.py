"""What four bits cost: measured, by theory, by scheme; and whether kernels are right."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Return ``perplexity``, which is documented here; what it needs is imported when asked for."""
    if name == "perplexity":
        from nf4.error.measured import perplexity

        return perplexity
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
