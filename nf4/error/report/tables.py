"""The report as tables: for a terminal, and as CSV."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nf4.error.measured import LayerError
from nf4.error.report.measure import ErrorReport
from nf4.error.schemes import CodebookError

# The columns of a table of layers, and what they mean
COLUMNS = {
    "layer": "name in the files",
    "shape": "out_features × in_features",
    "relative": "norm of the error over norm of the weights",
    "expected": "the same for normal weights, by theory",
    "ratio": "measured over expected",
    "SQNR dB": "signal to quantization noise ratio",
    "kurtosis": "excess kurtosis: 0 for normal weights, more for heavier tails",
    "outliers %": "weights beyond 4 times their root mean square; 0.0063 for normal ones",
    "largest": "largest error of a weight",
}


def cells(row: LayerError) -> tuple[list[str], list[float | str]]:
    """Return a layer's cells under `COLUMNS`, as shown and as values to sort by."""
    e, expected = row.error, row.error.expected.relative
    ratio = e.relative / expected if expected else math.nan
    values: list[float | str] = [
        row.name,
        float(e.numel),
        e.relative,
        expected,
        ratio,
        e.sqnr_db,
        e.kurtosis,
        100 * e.outlier_share,
        e.max_abs,
    ]
    formats = ("", "", ".4f", ".4f", ".3f", ".2f", ".2f", ".4f", ".4g")
    shown = [format(value, form) for value, form in zip(values, formats, strict=True)]
    shown[1] = "×".join(map(str, row.shape))
    return shown, values


def print_report(report: ErrorReport, console: Console) -> None:
    """Print every layer, the worst ten, the totals and perplexities."""
    console.print(_layers(f"{escape(report.model)}: {report.scheme.label}", report.layers))
    console.print(_layers(f"The {len(report.worst())} worst layers", report.worst()))
    totals = _table("All layers", "", "")
    for name, value in (
        ("layers", f"{len(report.layers)}"),
        ("weights", f"{report.parameters:,}"),
        ("bits per weight", f"{report.bits_per_weight:.3f}"),
        ("bytes", f"{report.bytes_after:,}"),
        ("relative error", f"{report.relative:.5f}"),
        ("expected of normal weights", f"{report.expected:.5f}"),
        ("SQNR", f"{report.sqnr_db:.2f} dB"),
        ("not normal", _not_normal(report)),
    ):
        totals.add_row(name, value)
    console.print(totals)
    if report.perplexities:
        table = _table(f"Perplexity on {report.tokens} tokens", "weights", "bits", "perplexity")
        for row in report.perplexities:
            table.add_row(row.label, f"{row.bits_per_weight:.3f}", f"{row.perplexity:.3f}")
        console.print(table)


def _not_normal(report: ErrorReport) -> str:
    """Say how many layers cost clearly more than theory expects of normal ones."""
    above = [r for r in report.layers if r.error.relative > 1.05 * r.error.expected.relative]
    return f"{len(above)} layers cost over 5 % more than expected"


def _layers(title: str, rows: Sequence[LayerError]) -> Table:
    """Return the columns that fit a terminal of 80; all are in the CSV and on the page."""
    kept = [i for i, name in enumerate(COLUMNS) if name not in ("ratio", "largest")]
    names = list(COLUMNS)
    table = _table(title, *(names[i] for i in kept))
    for row in rows:
        shown, _ = cells(row)
        table.add_row(*(escape(shown[i]) for i in kept))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=any(columns),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        name = i == 0
        table.add_column(
            column,
            justify="left" if name else "right",
            overflow="fold",
            no_wrap=not name,
            min_width=16 if name else None,
        )
    return table


def as_csv(report: ErrorReport) -> str:
    """Return the layers as CSV, with a line of names."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for i, row in enumerate(report.layers):
        expected = row.error.expected
        metrics = ("mse", "rmse", "mae", "max_abs", "relative", "sqnr_db")
        fields = {
            "layer": row.name,
            "kind": row.kind,
            "shape": "x".join(map(str, row.shape)),
            "bits_per_weight": row.bits_per_weight,
            **asdict(row.error),
            **{f"expected_{name}": getattr(expected, name) for name in metrics},
        }
        if i == 0:
            writer.writerow(fields)
        writer.writerow(fields.values())
    return out.getvalue()


def codebook_table(rows: Sequence[CodebookError]) -> Table:
    """Return mean squared errors on N(0, 1): two rows a scheme, a column a block size."""
    sizes = sorted({row.scheme.block_size for row in rows})
    table = _table(
        "Mean squared error on N(0, 1): by theory, and measured", "", "", *map(str, sizes)
    )
    for name in dict.fromkeys(row.scheme.kind for row in rows):
        own = {row.scheme.block_size: row for row in rows if row.scheme.kind == name}
        theory = [own[b].expected if b in own else None for b in sizes]
        if any(value is not None for value in theory):
            table.add_row(name, "theory", *("" if v is None else f"{v:.5f}" for v in theory))
        measured = (f"{own[b].measured:.5f}" if b in own else "" for b in sizes)
        table.add_row("" if any(theory) else name, "measured", *measured)
    return table
