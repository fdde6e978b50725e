"""Figures of the README and of the guide to benchmarks: ours beside bitsandbytes', by device."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from nf4.bench.harness import graphs, results
from nf4.bench.harness.circumstances import FOLDER
from nf4.bench.harness.markdown import table
from nf4.bench.harness.render import MODULES
from nf4.bench.harness.results import Results, Row
from nf4.bench.model import smollm2
from nf4.tools.paths import write_file

README = FOLDER.parent / "README.md"
GUIDE = FOLDER.parent / "notebooks" / "guides" / "benchmarks.md"
FRONT = "<!-- Made by `nf4 bench --render` from files in bench/results: do not edit. -->"
BEGIN = "<!-- Made by `nf4 bench --render` from bench/results: do not edit. -->"
METHODS = "<!-- Made by `nf4 bench --render` from comparisons in bench/results: do not edit. -->"
END = "<!-- End of what was made. -->"
COMPARISON = "nf4-compare-1"  # format of what nf4.commands.comparison writes
SHAPE = "4096×4096"
OPS = ("quantize", "dequantize", "matmul", "qlora_step")
PEERS = ("bitsandbytes", "bitsandbytes + PEFT")
DEMO = "demo-cpu.json"
# Operators and rows of the README's one table
IN_FRONT = ("quantize", "dequantize", "matmul, 1 row", "QLoRA step, 512 rows")
PRODUCTS_IN_FRONT = tuple(f"linear, {SHAPE}, M = {rows}" for rows in (1, 16, 4096))


def summary(folder: Path = results.RESULTS) -> str:
    """Return the tables of speed as Markdown: weights, and SmolLM2 in bf16, on each device.

    Raises:
        ValueError: a file of results is broken.
    """
    lines: list[str] = []
    for data, path in _files(folder):
        if data.get("format") == results.FORMAT:
            lines += _operators(results.from_json(data, str(path)))
        elif data.get("format") == graphs.FORMAT:
            lines += graphs.summary(data)
        elif data.get("format") == smollm2.FORMAT and data["dtype"] == "bf16":
            lines += _smollm2(data)
    return "\n".join(lines)


def front(folder: Path = results.RESULTS) -> str:
    """Return the table of the README as Markdown: a few figures, each with its file.

    Raises:
        ValueError: a file of results is broken.
    """
    rows: list[list[str]] = []
    for data, path in _files(folder):
        found: list[list[str]] = []
        if path.name == DEMO:
            found = _demo(data)
        elif data.get("format") == results.FORMAT:
            found = _front_operators(results.from_json(data, str(path)))
        elif data.get("format") == graphs.FORMAT:
            lines = (line.strip("| ").split(" | ") for line in graphs.summary(data))
            found = [
                [f"{what}, bf16", f"{ours} µs", f"bitsandbytes: {theirs} µs"]
                for what, ours, theirs, *_ in (cells for cells in lines if len(cells) > 2)
                if what in PRODUCTS_IN_FRONT
            ]
        elif data.get("format") == smollm2.FORMAT and data["dtype"] == "bf16":
            found = [
                [f"{data['model']}: {what}", f"{ours} s", f"bitsandbytes: {theirs} s"]
                for what, ours, theirs, *_ in smollm2.rows(data)
            ]
        source = f"[{path.stem}](bench/results/{path.name})"
        rows += [[what, data["device"], *cells, source] for what, *cells in found]
    return "\n".join(table(["measured", "device", "nf4", "beside", "file"], rows))


def _demo(data: dict[str, Any]) -> list[list[str]]:
    """Return what the demo measured: bytes, and perplexity before and after training."""
    found = data["result"]
    before, after = (f"{found[f'linear_bytes_{x}'] / 1e6:.1f} MB" for x in ("before", "after"))
    plain, nf4, tuned = (
        found[name] for name in ("perplexity_fp32", "perplexity_nf4", "held_out_tuned")
    )
    name = found["model"]
    return [
        [f"{name}: its {found['layers']} linear layers", after, f"fp32: {before}"],
        [
            f"{name}: perplexity of Wikipedia, {found['perplexity_tokens']} tokens",
            f"{nf4:.2f}",
            f"fp32: {plain:.2f}",
        ],
        [
            f"{name}: perplexity of Macbeth after {found['steps']} steps of QLoRA",
            f"{tuned:.2f}",
            f"before them: {found['held_out_nf4']:.2f}",
        ],
    ]


def _front_operators(found: Results) -> list[list[str]]:
    """Return a few operators in bf16, in ms of CPU time of all threads, or of time."""
    sections = {op: found.sections[op] for op in OPS if op in found.sections}
    rows = [cells for op, s in sections.items() for row in s.rows for cells in _cells(op, row)]
    return [
        [f"{what}, {SHAPE}, {dtype}", f"{ours} ms", f"bitsandbytes: {theirs} ms"]
        for what, dtype, ours, theirs, _ in rows
        if what in IN_FRONT and dtype == "bf16"
    ]


def methods(folder: Path = results.RESULTS) -> str:
    """Return the tables of methods of fine-tuning as Markdown, see `nf4.commands.comparison`.

    Raises:
        ValueError: a file of results is broken.
    """
    comparison = import_module(MODULES[COMPARISON])
    found = (data for data, _ in _files(folder) if data.get("format") == COMPARISON)
    return "\n".join(line for data in found for line in comparison.summary(data))


def _files(folder: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    for path in sorted(folder.glob("*.json")):
        yield results.load_json(path), path


def write_readme() -> None:
    """Put the tables into the README and the guide of this checkout, where their marks are.

    Raises:
        ValueError: a page with all its marks is not there, or a file of results is broken.
    """
    pages = {
        README: ((FRONT, front()),),
        GUIDE: ((BEGIN, summary()), (METHODS, methods())),
    }
    made = {path: _filled(path, parts) for path, parts in pages.items()}
    for path, text in made.items():
        write_file(path, text)


def _filled(path: Path, parts: tuple[tuple[str, str], ...]) -> str:
    """Return the text of a page with each table after its mark."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for mark, made in parts:
        before, begin, rest = text.partition(mark)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"render: expected {path} to hold {mark} and {END}")
        text = f"{before}{mark}\n\n{made}\n{END}{after}"
    return text


def _operators(found: Results) -> list[str]:
    cpu = any(s.circumstances["driver"] is None for s in found.sections.values())
    sections = {op: found.sections[op] for op in OPS if op in found.sections}
    rows = [cells for op, s in sections.items() for row in s.rows for cells in _cells(op, row)]
    if not rows:
        return []
    measure = "ms of CPU time, of all threads" if cpu else "ms"
    columns = [f"{SHAPE}, {measure}", "dtype", "nf4", "bitsandbytes", "theirs / ours"]
    return [f"{found.device}:", "", *table(columns, rows)]


def _cells(op: str, row: Row) -> Iterator[list[str]]:
    """Yield a line if the case is one of the tables' and bitsandbytes was there."""
    peer = next((name for name in PEERS if name in row.timings), None)
    if row.labels.get("W") != SHAPE or peer is None or row.labels.get("pass") == "forward":
        return
    what = "QLoRA step" if op == "qlora_step" else op
    if "M" in row.labels:
        what += f", {row.labels['M']} rows" if row.labels["M"] != "1" else ", 1 row"
    ours, theirs = (row.timings[name] for name in ("nf4", peer))
    times = [t.median if t.cpu is None else t.cpu for t in (ours, theirs)]
    yield [
        what,
        row.labels["dtype"],
        *(f"{time / 1e3:.2f}" for time in times),
        f"{times[1] / times[0]:.1f}",
    ]


def _smollm2(data: dict[str, Any]) -> list[str]:
    cells = [[*row[:3], row[3]] for row in smollm2.rows(data)]
    perplexity = ", ".join(f"{data['perplexity'][name]:.2f}" for name in smollm2.NAMES)
    columns = [f"{data['model']} in bf16, seconds: best (median)", "nf4", "bitsandbytes + PEFT"]
    return [
        f"{data['device']}; perplexity {perplexity}:",
        "",
        *table([*columns, "theirs / ours"], cells),
    ]
