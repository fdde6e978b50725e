"""The command ``nf4``: parses arguments and prints, decides nothing.

A command imports what it needs after its arguments have been checked: torch takes a second.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from nf4 import __version__
from nf4.commands import arguments as given
from nf4.commands.bench import add_bench
from nf4.commands.compare import add_compare
from nf4.commands.merge import add_merge
from nf4.commands.plan import add_plan
from nf4.tools.install import missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as on the command line, without the program's name; ``sys.argv`` by default.

    Returns:
        0 if it did what was asked, 1 if what was checked is wrong, 2 after an error of the user's,
        which is one line on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, options.command)
            return int(options.run(options) or 0)
    except (ValueError, TypeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and error.name:
            reason = missing(error.name)
        sys.stderr.write(f"nf4 {options.command}: {reason}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"nf4 {options.command}: interrupted\n")
        return 130


def _show_warning(command: str, message: Warning | str, *rest: Any) -> None:
    """Print a warning as errors are, without the line of code that it comes from."""
    sys.stderr.write(f"nf4 {command}: warning: {' '.join(str(message).split())}\n")


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the complaint and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nf4", description="4-bit NormalFloat for PyTorch.")
    parser.add_argument("--version", action="version", version=f"nf4 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="quantize, measure, fine-tune, save, reload and merge a real model",
        description="Quantize a real language model, measure what it costs, fine-tune it with "
        "QLoRA, save and reload the adapter, merge it, and write tables and pictures. Needs no "
        "GPU and no network; about three minutes on two cores.",
    )
    demo.add_argument("--steps", type=int, default=40, help="steps of fine-tuning (default: 40)")
    demo.add_argument(
        "--model", help="a .gguf file or a transformers folder (default: SmolLM2-135M, packaged)"
    )
    demo.add_argument(
        "--text", help="a UTF-8 text to train on, last tenth held out (default: Shakespeare)"
    )
    demo.add_argument(
        "--out", help="folder to write, must not exist (default: nf4-demo, or the next free number)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of all randomness (default: 0)")
    demo.add_argument("--json", action="store_true", help="print the result as JSON")
    demo.set_defaults(run=_demo)
    _add_quantize(commands)
    _add_export(commands)
    add_merge(commands, _file_bar)
    _add_error(commands)
    add_bench(commands)
    add_compare(commands, _free_folder)
    add_plan(commands)
    check = commands.add_parser(
        "verify",
        help="check every operator on this machine against its reference and float64",
        description="Run every operator on a device, by its kernels where it has them. Codes, "
        "scales and dequantized values are compared bit for bit with the reference, products and "
        "gradients with float64. Exit status 1 if anything differs.",
    )
    check.add_argument("--device", help="cuda, cuda:1, cpu, … (default: a GPU if there is one)")
    check.add_argument("--seed", type=int, default=0, help="seed of the values (default: 0)")
    check.add_argument("--json", action="store_true", help="print every comparison as JSON")
    check.set_defaults(run=_verify)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    """Add how to quantize."""
    command.add_argument("--block-size", type=int, default=64, help="32 to 4096 (default: 64)")
    command.add_argument("--no-double-quant", action="store_true", help="keep scales in fp32")
    command.add_argument(
        "--scale", default="absmax", help="absmax, mse or mse-positive (default: absmax)"
    )


def _add_quantize(commands: Any) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="quantize a transformers folder into another, a weight at a time",
        description="Quantize the linear layers of a transformers folder into a new folder that "
        "from_pretrained opens. The model is never in memory; an interrupted run goes on where it "
        "was when called again. Experts of a mixture stay dense. torchrun --nproc-per-node=N -m "
        "nf4.commands.cli quantize … shares the files among N processes, by bytes; the new folder "
        "is the same for any N, and an interrupted run goes on with another N too.",
    )
    quantize.add_argument("source", help="folder with config.json and safetensors")
    quantize.add_argument("target", nargs="?", help="folder to make, must not exist")
    quantize.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and write nothing"
    )
    _add_options(quantize)
    quantize.add_argument(
        "--skip",
        action="append",
        help="a module to leave dense, may be repeated; replaces the default, what transformers "
        "leaves alone; +NAME adds to it",
    )
    quantize.add_argument("--json", action="store_true", help="print the result as JSON")
    quantize.set_defaults(run=_quantize)


@contextmanager
def _file_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what moves a bar of files on, which is not shown before what was asked is checked."""
    from nf4.tools.progress import progress_bar

    with ExitStack() as stack:
        bars: list[Any] = []

        def step(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress_bar(title, total)))
            bars[0].step()

        yield step


def _quantize(options: argparse.Namespace) -> None:
    given.check_quantize(options)
    if options.dry_run:
        _plan_quantize(options)
        return
    from nf4.files.stream import quantize_checkpoint
    from nf4.tools.job import launched

    with _file_bar("Quantize files") as step:
        made = quantize_checkpoint(
            options.source,
            options.target,
            options.skip,
            options.block_size,
            not options.no_double_quant,
            options.scale,
            step,
        )
    if launched()[0]:
        return
    if options.json:
        sys.stdout.write(json.dumps(asdict(made)) + "\n")
        return
    sizes = f"{made.bytes_before / 1e6:,.1f} MB became {made.bytes_after / 1e6:,.1f} MB"
    sys.stdout.write(f"{made.layers} layers quantized; {sizes} in {options.target}\n")


def _plan_quantize(options: argparse.Namespace) -> None:
    from nf4.files.planned import plan_checkpoint

    planned = plan_checkpoint(
        options.source,
        options.skip,
        options.block_size,
        not options.no_double_quant,
        options.scale,
    )
    if options.json:
        sys.stdout.write(json.dumps([asdict(one) for one in planned]) + "\n")
        return
    groups: dict[str, list[Any]] = {}
    for one in planned:
        label = f"stay dense: {one.stays}" if one.stays else "quantized"
        groups.setdefault(label, []).append(one)
    sys.stdout.write(f"{'tensors':>8}  {'MB before':>12}  {'MB after':>12}\n")
    for label, tensors in [*sorted(groups.items()), ("in all; nothing was written", planned)]:
        before, after = (sum(getattr(one, n) for one in tensors) for n in _BYTES)
        sys.stdout.write(
            f"{len(tensors):8,}  {before / 1e6:12,.3f}  {after / 1e6:12,.3f}  {label}\n"
        )
        if label.endswith(("skip_modules", "others")):
            sys.stdout.writelines(f"{'':40}{one.name} {list(one.shape)}\n" for one in tensors)


_BYTES = ("bytes_before", "bytes_after")


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a folder of 4-bit weights in the files of another program",
        description="Write a folder that nf4 saved in four bits as bitsandbytes' files, with a "
        "config by which transformers and servers open it without nf4. Codes and scales stay as "
        "they are; embeddings, and experts of a mixture, become dense.",
    )
    export.add_argument("source", help="folder with 4-bit weights of nf4")
    export.add_argument("target", help="folder to make, must not exist")
    export.add_argument("--format", required=True, help="bitsandbytes")
    export.add_argument("--json", action="store_true", help="print the result as JSON")
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    given.check_export(options)
    from nf4.files.export import export_checkpoint

    with _file_bar("Export files") as step:
        made = export_checkpoint(options.source, options.target, options.format, step)
    if options.json:
        sys.stdout.write(json.dumps(asdict(made)) + "\n")
        return
    dense = f", {made.dense} became dense" if made.dense else ""
    size = f"{made.bytes_after / 1e6:,.1f} MB"
    sys.stdout.write(f"{made.layers} layers in four bits{dense}; {size} in {options.target}\n")


def _add_error(commands: Any) -> None:
    error = commands.add_parser(
        "error",
        help="measure what four bits cost a model, layer by layer",
        description="Measure the error of each linear layer of a model's files, one weight in "
        "memory at a time, next to what theory expects of normal weights. With --out, also compare "
        "block sizes, scales and codebooks, and write a page with pictures, JSON and CSV.",
    )
    error.add_argument(
        "model",
        nargs="?",
        help="a transformers folder, a folder of safetensors or .bin files, one such file, a .gguf "
        "file, or a packaged model: smollm2, minilm, albert, mgm",
    )
    _add_options(error)
    error.add_argument(
        "--skip",
        action="append",
        help="a module to leave out, may be repeated; replaces the default, lm_head; +NAME adds to "
        "it",
    )
    error.add_argument(
        "--perplexity",
        metavar="TEXT",
        help="score the text under fp32, NF4, block sizes, kinds of scale and codebooks: a UTF-8 "
        "file, or wikipedia for packaged articles; holds the model in memory twice, in fp32",
    )
    error.add_argument(
        "--tokens", type=int, default=4096, help="of the text to score (default: 4096)"
    )
    error.add_argument("--out", help="folder to write report.html and more to, must not exist")
    error.add_argument(
        "--codebooks",
        action="store_true",
        help="instead of a model: every codebook at every block size on N(0, 1), by theory and "
        "measured",
    )
    form = error.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the report as JSON")
    form.add_argument("--csv", action="store_true", help="print the layers as CSV")
    error.set_defaults(run=_error)


def _error(options: argparse.Namespace) -> None:
    given.check_error(options)
    from nf4.error.report import tables
    from nf4.error.report.measure import as_json
    from nf4.error.report.run import run_error
    from nf4.error.schemes import Scheme
    from nf4.tools.progress import progress_bar

    if options.codebooks:
        _codebooks(options)
        return
    scheme = Scheme("nf4", options.block_size, not options.no_double_quant, options.scale)
    report = run_error(
        options.model,
        ["lm_head"] if options.skip is None else options.skip,
        scheme,
        options.perplexity,
        options.tokens,
        options.out,
        progress_bar,
    )
    if options.json:
        sys.stdout.write(json.dumps(as_json(report), ensure_ascii=False) + "\n")
    elif options.csv:
        sys.stdout.write(tables.as_csv(report))
    else:
        tables.print_report(report, _console())
    if options.out is not None:
        sys.stderr.write(f"{Path(options.out) / 'report.html'}\n")


def _codebooks(options: argparse.Namespace) -> None:
    from nf4.error.report import tables
    from nf4.error.schemes import codebook_errors, compared
    from nf4.tools.progress import progress_bar

    with progress_bar("Measure codebooks", len(compared())) as bar:
        rows = codebook_errors(progress=lambda *_: bar.step())
    if options.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows]) + "\n")
        return
    _console().print(tables.codebook_table(rows))


def _console() -> Any:
    """Return rich's console; wide where no terminal sets the width."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def _demo(options: argparse.Namespace) -> None:
    given.check_demo(options)
    from rich.console import Console

    from nf4.commands.demo.report import print_result
    from nf4.commands.demo.run import run_demo
    from nf4.tools.progress import progress_bar

    out = options.out if options.out is not None else _free_folder("nf4-demo")
    result = run_demo(options.steps, options.model, options.text, out, options.seed, progress_bar)
    if options.json:
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
    else:
        print_result(result, Console())


def _verify(options: argparse.Namespace) -> int:
    given.check_verify(options)
    import torch
    from rich.console import Console

    from nf4.error.verify import comparisons, verify
    from nf4.tools.progress import progress_bar

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with progress_bar(f"Verify on {device}", comparisons()) as bar:
        rows = verify(device, lambda *_: bar.step(), options.seed)
    wrong = [row for row in rows if not row.ok]
    if options.json:
        sys.stdout.write(json.dumps([{**asdict(row), "ok": row.ok} for row in rows]) + "\n")
    else:
        Console().print(_verify_table(rows))
        for row in wrong[:20]:
            sys.stdout.write(f"{row.operator}: {row.case}: {row.found:g}, at most {row.bound:g}\n")
    return 1 if wrong else 0


def _verify_table(rows: Sequence[Any]) -> Any:
    from rich.table import Table

    table = Table("operator", "against", "comparisons", "wrong", "nearest to its bound")
    for name, against in dict.fromkeys((row.operator, row.against) for row in rows):
        own = [row for row in rows if (row.operator, row.against) == (name, against)]
        wrong = sum(not row.ok for row in own)
        nearest = max((row.found / row.bound for row in own if row.bound), default=None)
        share = "" if nearest is None else f"{100 * nearest:.0f} %"
        table.add_row(name, against, str(len(own)), str(wrong), share)
    return table


def _free_folder(name: str) -> Path:
    """Return name, or name-2, name-3 and so on: the first that does not exist."""
    number, path = 1, Path(name)
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}")
    return path


if __name__ == "__main__":
    sys.exit(main())
