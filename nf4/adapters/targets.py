"""Which modules PEFT's target_modules mean, by their names."""

import re
from collections.abc import Iterable

from nf4.ops.checks import check_names, compile_pattern


def match_targets(names: Iterable[str], targets: str | Iterable[str], option: str) -> set[str]:
    """Return the names that targets mean: an expression for the whole name, or a list of ends.

    Raises:
        TypeError: targets are no strings.
        ValueError: targets are no regular expression.
    """
    if isinstance(targets, str):
        pattern = compile_pattern(targets, option)
        return {name for name in names if pattern.fullmatch(name)}
    return match_names(names, check_names(targets, option))


def match_names(names: Iterable[str], targets: Iterable[str]) -> set[str]:
    """Return the names that a list of targets means to PEFT: equal, or ending in ``.target``."""
    targets = tuple(targets)
    ends = tuple(f".{target}" for target in targets)
    return {name for name in names if name in targets or name.endswith(ends)}


def shortest_targets(names: Iterable[str], wanted: set[str]) -> list[str] | str:
    """Return the shortest form of PEFT's target_modules that means these names and no others."""
    names = list(names)
    for targets in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        if match_names(names, targets) == wanted:
            return targets
    return "|".join(re.escape(name) for name in sorted(wanted))
