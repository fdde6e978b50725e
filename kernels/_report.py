"""Compile every kernel for every GPU, without one: one row a variant and target."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import (
    dequantize,
    dequantize_merge,
    lora_down,
    lora_grad,
    lora_up,
    matmul,
    matmul_row,
    matmul_small,
    quantize,
    quantize_absmax,
    quantize_mse,
    repack,
    row_group,
)
from ._aot import Report, Variant, report
from ._targets import TARGETS, check_targets


@dataclass(frozen=True)
class Row:
    """What the compiler made of one variant for one target."""

    name: str
    target: str
    num_warps: int
    report: Report


def variants() -> list[Variant]:
    """Return the variants of all kernels."""
    modules = (
        quantize,
        quantize_mse,
        quantize_absmax,
        dequantize,
        repack,
        dequantize_merge,
        matmul_row,
        row_group,
        matmul_small,
        matmul,
        lora_down,
        lora_up,
        lora_grad,
    )
    return [variant for module in modules for variant in module.variants()]


def compilations(targets: Iterable[str] = TARGETS) -> list[tuple[Variant, str]]:
    """Return each variant with each of the targets that it is compiled for."""
    wanted = list(targets)
    return [(v, target) for v in variants() for target in v.targets if target in wanted]


def compile_all(
    targets: Iterable[str] = TARGETS, progress: Callable[[str], None] = lambda name: None
) -> list[Row]:
    """Compile every variant for every target.

    Args:
        targets: names such as ``"sm_90"`` and ``"gfx942"``.
        progress: called with a name after each compilation.

    Raises:
        ValueError: a target is not known.
    """
    rows = []
    for variant, target in compilations(check_targets(targets)):
        rows.append(Row(variant.name, target, variant.num_warps, report(variant, target)))
        progress(f"{variant.name}, {target}")
    return rows


_COLUMNS = (
    "kernel",
    "GPU",
    "warps",
    "registers",
    "spills",
    "shared",
    "instructions / weight",
    "cycles / 32 weights: issue, ALU, FMA, LSU",
    "loads, stores, shuffles",
)


def table(rows: Iterable[Row]) -> str:
    """Return rows as a table in Markdown."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for row in rows:
        r = row.report
        nvidia = r.instructions is not None
        pipes = (r.cycles[pipe] for pipe in ("ISSUE", "ALU", "FMA", "LSU"))
        cells = (
            row.name,
            row.target,
            row.num_warps,
            r.registers,
            r.spills,
            r.shared,
            f"{r.instructions:.2f}" if nvidia else "",
            ", ".join(f"{c:.1f}" for c in pipes) if nvidia else "",
            ", ".join(f"{count} {op}" for op, count in sorted(r.memory.items())),
        )
        lines.append(tuple(map(str, cells)))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
