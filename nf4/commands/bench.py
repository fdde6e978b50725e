"""The command ``nf4 bench``: parses arguments and prints, decides nothing."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from nf4.commands.arguments import check_json_file
from nf4.tools.shapes import parse_shape

DESCRIPTION = """\
Measure operators against a copy, the library's products and other packages, each checked before it
is timed; print tables, and write them to bench/results/<device>.json of a checkout, else to the
current folder. Exit status 1 if a result is wrong.

  nf4 bench                                            all operators, small on a CPU
  nf4 bench matmul dequantize --model llama-3-8b       two operators, a model's weights
  nf4 bench matmul --shapes 16x4096x4096 8192x8192     16 rows of x, and the default rows
  nf4 bench --compare old.json new.json                exit status 1 if something is slower
"""
MEASURING = ("model", "rows", "ranks", "dtypes", "device", "threads", "rounds", "out", "plot")


def add_bench(commands: Any) -> None:
    """Add the command to the subcommands of a parser."""
    bench = commands.add_parser(
        "bench",
        help="measure operators against others, compare measurements, tune and inspect kernels",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    (folder,) = import_module("nf4.bench").__path__
    ops = sorted(file.stem.removeprefix("bench_") for file in Path(folder).glob("bench_*.py"))
    bench.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(ops)} (default: all)")
    sizes = bench.add_argument_group("what to measure")
    sizes.add_argument("--shapes", nargs="+", metavar="[Mx]NxK", help="of W, with rows of x or not")
    sizes.add_argument("--model", help="the shapes of a model: llama-3-8b, llama-3-70b, qwen3-32b")
    sizes.add_argument("--rows", nargs="+", type=int, metavar="M", help="of x")
    sizes.add_argument("--ranks", nargs="+", type=int, metavar="r", help="of the adapter")
    sizes.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="bf16, fp16, fp32")
    sizes.add_argument("--device", help="cuda, cuda:1, … or cpu (default: a GPU if there is one)")
    sizes.add_argument("--threads", type=int, help="of a CPU (default: PyTorch's)")
    sizes.add_argument(
        "--rounds", type=int, help="calls of each function (default: 20, fewer where it is slow)"
    )
    sizes.add_argument("--out", help="file to write, or to add to")
    sizes.add_argument("--plot", metavar="FOLDER", help="draw rooflines and sweeps of M as PNG")
    bench.add_argument("--json", action="store_true", help="print the result as JSON")
    modes = bench.add_argument_group("instead of measuring").add_mutually_exclusive_group()
    modes.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="show what changed; exit status 1 on a regression beyond the spread",
    )
    modes.add_argument(
        "--render",
        action="store_true",
        help="make bench/README.md, and the figures of README.md and of the guide to benchmarks, "
        "from bench/results",
    )
    modes.add_argument(
        "--compile",
        action="store_true",
        help="compile every kernel ahead of time and print registers, spills, shared memory and, "
        "for NVIDIA, instructions per weight and the width of loads and stores; needs no GPU",
    )
    modes.add_argument(
        "--tune",
        action="store_true",
        help="measure which product kernel and which tile is fastest on this GPU, for --shapes, "
        "and keep it for later runs",
    )
    bench.add_argument(
        "--target", nargs="+", help="with --compile: sm_90, gfx942, … (default: all)"
    )
    bench.set_defaults(run=run_bench)


def run_bench(options: argparse.Namespace) -> int:
    """Run the command with parsed arguments, and return its exit status."""
    modes: dict[str, Callable[[argparse.Namespace], int]] = {
        "compare": _compare,
        "render": _render,
        "compile": _compile,
        "tune": _tune,
    }
    mode = next((name for name in modes if getattr(options, name)), None)
    _check_fits(options, mode)
    return _measure(options) if mode is None else modes[mode](options)


def _check_fits(options: argparse.Namespace, mode: str | None) -> None:
    """Raise ValueError if an option was given that the mode does not take."""
    if options.target and mode != "compile":
        raise ValueError("target: expected --compile beside it")
    if mode is None:
        return
    names = MEASURING if mode == "tune" else (*MEASURING, "shapes")
    for name in ("ops", *names):
        value = getattr(options, name)
        if value not in (None, []):
            raise ValueError(f"{name}: expected nothing of the kind beside --{mode}, got {value}")


def _measure(options: argparse.Namespace) -> int:
    names = ("ops", "shapes", "model", "rows", "ranks", "dtypes", "device", "threads", "rounds")
    asked = {name: getattr(options, name) for name in names}
    import_module("nf4.bench.harness.asked").Asked(**asked).check()

    from nf4.tools.progress import progress_bar

    run = import_module("nf4.bench.harness.run")
    requests = import_module("nf4.bench.harness.request")
    request = requests.Request(**asked)
    if options.plot is not None:
        import_module("matplotlib")  # not to be missed only after all is measured
    plan = run.plan(request, options.out)
    with progress_bar("Measure", 1 + len(plan.modules)) as bar:
        outcome = run.run(plan, bar.step)
    found = outcome.measured
    if options.json:
        sys.stdout.write(found.to_json())
    elif found.sections:
        sys.stdout.write(import_module("nf4.bench.harness.render").run_page(found))
    if options.plot is not None:
        for path in import_module("nf4.bench.harness.plots").draw(found, Path(options.plot)):
            sys.stderr.write(f"{path}\n")
    if outcome.disturbed:
        sys.stderr.write(
            f"nf4 bench: the 80th percentile of a ceiling is {outcome.spread:.2f} times its 20th: "
            "something else is at work on this machine, these times cannot be believed\n"
        )
    if found.sections:
        sys.stderr.write(f"{outcome.path}\n")
    for op, reason in outcome.refused.items():
        sys.stderr.write(f"nf4 bench: {op}: {reason}\n")
    if outcome.refused:
        return 1 if outcome.wrong else 2
    return 0


def _compare(options: argparse.Namespace) -> int:
    for file in options.compare:
        check_json_file(file)
    compare = import_module("nf4.bench.harness.compare")
    changes = compare.compare(*map(Path, options.compare))
    if options.json:
        sys.stdout.write(json.dumps([asdict(c) for c in changes], ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(compare.table(changes))
    return 1 if compare.regressed(changes) else 0


def _render(options: argparse.Namespace) -> int:
    path = import_module("nf4.bench.harness.render").write_page()
    import_module("nf4.bench.harness.summary").write_readme()
    sys.stdout.write(json.dumps(str(path)) + "\n" if options.json else f"{path}\n")
    return 0


def _compile(options: argparse.Namespace) -> int:
    known = import_module("nf4.kernels._targets")
    targets = known.check_targets(options.target or known.TARGETS)

    from nf4.tools.progress import progress_bar

    compiler = import_module("nf4.kernels._report")
    with progress_bar("Compile", len(compiler.compilations(targets))) as bar:
        rows = compiler.compile_all(targets, bar.step)
    if options.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows]) + "\n")
    else:
        sys.stdout.write(compiler.table(rows))
    return 0


def _tune(options: argparse.Namespace) -> int:
    for shape in options.shapes or []:
        parse_shape(shape)

    from nf4.tools.progress import progress_bar

    tuner = import_module("nf4.gpu.tune")
    shapes = tuner.parse_shapes(options.shapes) if options.shapes else tuner.SHAPES
    gpu = tuner.find_gpu()
    with progress_bar("Measure", len(shapes)) as bar:
        path = tuner.tune(shapes, gpu, bar.step)
    sys.stdout.write(path.read_text(encoding="utf-8") if options.json else f"{path}\n")
    return 0
