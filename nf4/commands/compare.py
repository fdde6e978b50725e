"""The command ``nf4 compare``: parses arguments and prints, decides nothing."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Fine-tune one model by each method, at equal steps on the same batches, each in a process of its
own, and print trainable parameters, peak memory, seconds a step, perplexity on held-out text, and
the size of the adapter. Needs no GPU and no network. Exit status 1 if a method failed.

  nf4 compare                                          SmolLM2-135M, every method, on Shakespeare
  nf4 compare MODEL --text my.txt --steps 200          a transformers folder and a text of yours
  nf4 compare --methods qlora t-few --lr t-few=1e-2    two methods, one at another learning rate
"""


def add_compare(commands: Any, free_folder: Callable[[str], Path]) -> None:
    """Add the command to the subcommands of a parser.

    Args:
        commands: of the parser.
        free_folder: returns a folder that does not exist for a name.
    """
    compare = commands.add_parser(
        "compare",
        help="fine-tune one model by each method and compare what it takes and gives",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument(
        "model",
        nargs="?",
        help="a .gguf file or a transformers folder (default: SmolLM2-135M, packaged)",
    )
    compare.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="base, lora, qlora, t-few, adamix (default: all)",
    )
    compare.add_argument("--steps", type=int, default=40, help="of each method (default: 40)")
    compare.add_argument(
        "--text", help="a UTF-8 text to train on, last tenth held out (default: Shakespeare)"
    )
    compare.add_argument("--r", type=int, default=8, help="rank of the adapters (default: 8)")
    compare.add_argument(
        "--dtype", default="float32", help="float32 or bfloat16, of products (default: float32)"
    )
    compare.add_argument("--seed", type=int, default=0, help="seed of all randomness (default: 0)")
    compare.add_argument(
        "--lr",
        action="append",
        default=[],
        metavar="METHOD=VALUE",
        help="peak learning rate of a method, may be repeated",
    )
    compare.add_argument("--device", help="cuda, … or cpu (default: a GPU if there is one)")
    compare.add_argument("--threads", type=int, help="of a CPU (default: PyTorch's)")
    compare.add_argument(
        "--out",
        help="folder to write, must not exist (default: nf4-compare, or the next free number)",
    )
    compare.add_argument("--json", action="store_true", help="print the result as JSON")
    compare.add_argument("--results", metavar="FILE", help="write the result as JSON here, too")
    compare.set_defaults(run=partial(_compare, free_folder))


def _compare(free_folder: Callable[[str], Path], options: argparse.Namespace) -> int:
    from nf4.commands.comparison.options import Options, check_results
    from nf4.tools.paths import check_new

    names = ("model", "methods", "steps", "text", "r", "dtype", "seed", "device", "threads")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    asked = Options(**given, lr=_rates(options.lr))
    out = Path(options.out) if options.out is not None else free_folder("nf4-compare")
    check_new(out, "out")
    check_results(options.results)

    from nf4.commands.comparison.report import tables
    from nf4.commands.comparison.run import MethodsFailedError, run_compare
    from nf4.tools.progress import progress_bar

    try:
        data = run_compare(asked, out, options.results, progress_bar)
    except MethodsFailedError as error:
        failed = error.failed
    else:
        failed = data["failed"]
        sys.stdout.write(json.dumps(data) + "\n" if options.json else tables(data))
        sys.stderr.write(f"{out}\n")
    for name, reason in failed.items():
        sys.stderr.write(f"nf4 compare: {name}: {reason}\n")
    return 1 if failed else 0


def _rates(given: list[str]) -> dict[str, float]:
    """Return learning rates by method.

    Raises:
        ValueError: one is not METHOD=VALUE, or a method has two.
    """
    rates: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            rate = float(value)
        except ValueError:
            raise ValueError(f"lr: expected METHOD=VALUE, VALUE a number, got {text!r}") from None
        if name in rates:
            raise ValueError(f"lr: expected one value for {name}, got two")
        rates[name] = rate
    return rates
