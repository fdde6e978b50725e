"""The GPUs that kernels are compiled for ahead of time. Nothing here imports Triton."""

from collections.abc import Iterable

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx90a", "gfx1100")


def check_targets(targets: Iterable[str]) -> list[str]:
    """Return the targets as a list, or raise ValueError if one is not known."""
    found = list(targets)
    for target in found:
        if target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target}")
    return found
