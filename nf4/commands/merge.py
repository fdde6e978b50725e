"""``nf4 merge``: fold an adapter into a folder of weights, and say what it cost."""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

from nf4.commands import arguments as given

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
_SHOWN = 12  # layers in the table; --json has all


def add_merge(commands: Any, file_bar: Bar) -> None:
    """Add the command.

    Args:
        commands: what takes parsers of commands.
        file_bar: yields, for a title, what moves a bar of files on.
    """
    merge = commands.add_parser(
        "merge",
        help="fold an adapter into a transformers folder, a weight at a time, into a dense one",
        description="Fold an adapter into the weights of a transformers folder, 4-bit by nf4 or "
        "bitsandbytes or dense, and write a dense folder that from_pretrained opens without nf4. "
        "The sum is taken in fp32 and rounded once. The model is never in memory; an interrupted "
        "run goes on where it was when called again. Prints what rounding cost each layer, and "
        "with --original what quantization did.",
    )
    merge.add_argument("base", help="folder with config.json and safetensors")
    merge.add_argument("adapter", help="folder with adapter_config.json and its weights")
    merge.add_argument("target", help="folder to make, must not exist")
    merge.add_argument("--dtype", help="bf16, fp16 or fp32 (default: that of the base's config)")
    merge.add_argument(
        "--original",
        metavar="DENSE",
        help="folder of the weights before quantization, to measure from; needed for an adapter "
        "that started by PiSSA from them",
    )
    merge.add_argument("--json", action="store_true", help="print the result as JSON")
    merge.set_defaults(run=partial(_merge, file_bar))


def _merge(file_bar: Bar, options: argparse.Namespace) -> None:
    given.check_merge(options)
    from nf4.files.merging import merge_checkpoint

    folders = (options.base, options.adapter, options.target)
    with file_bar("Merge files") as step:
        made = merge_checkpoint(*folders, options.dtype, options.original, step)
    if options.json:
        sys.stdout.write(json.dumps(asdict(made)) + "\n")
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(_table(made))
    size = f"{made.bytes_after / 1e6:,.1f} MB"
    sys.stdout.write(f"{made.adapted} layers merged; {size} of {made.dtype} in {options.target}\n")


def _table(made: Any) -> Any:
    """Return the layers that lost most, and all together."""
    from rich.table import Table

    cost = made.from_original is not None
    head = ["layer", f"rounding to {made.dtype}", "of the adapter's update"]
    table = Table(*head, *(["from original + adapter"] if cost else []))

    def add(name: str, *values: float | None) -> None:
        shown = ("" if value is None else f"{100 * value:.3g} %" for value in values)
        table.add_row(name, *shown)

    layers = sorted(made.layers, key=lambda row: (row.from_original or 0, row.relative))
    for row in reversed(layers[-_SHOWN:]):
        add(row.name, row.relative, row.of_update, *([row.from_original] if cost else []))
    left = len(layers) - _SHOWN
    if left > 0:
        table.add_row(f"… {left} more, better ones: --json has them")
    table.add_section()
    add("all", made.relative, None, *([made.from_original] if cost else []))
    return table
