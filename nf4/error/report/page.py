"""The report as one HTML page that needs nothing else: pictures inside, no network."""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from nf4.error.measured import LayerError
from nf4.error.report.measure import ErrorReport
from nf4.error.report.tables import COLUMNS, cells

_CAPTIONS = {
    "layers": "How far each weight is from what it was. The dashed line is what theory expects of "
    "normal weights; layers above it have outliers, or parts of different spread.",
    "weights": "Every weight over the largest magnitude of its block. NF4's levels lie densest "
    "where normal weights do; the columns at the ends hold the largest of each block themselves.",
    "theory": "Left: a layer of heavier tails than a normal one (kurtosis above 0) costs more than "
    "theory says. Right: every codebook at every block size; on the dashed line the model's "
    "weights are as good as normal.",
    "bits": "What a bit buys. Smaller blocks cost scales; double quantization makes them cheaper; "
    "scales of least squared error cost nothing, and any reader of NF4 decodes them. Compared on "
    "a sample of each layer.",
    "perplexity": "What the error does to the model's predictions.",
}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: #1b1f24; --paper: #fff; --soft: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #15181c; --soft: #20252b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 1180px; padding: 1.5rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: .8rem; }
.tiles div { background: var(--soft); border-radius: .5rem; padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.35rem; } .tiles span { opacity: .75; font-size: .85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr));
  gap: 1.2rem; }
.pictures { margin-top: 1.2rem; } #theory, #perplexity { grid-column: 1 / -1; }
figure { margin: 0; } figure img { width: 100%; background: #fff; border-radius: .5rem; }
figcaption { font-size: .85rem; opacity: .8; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { position: sticky; top: 0; background: var(--soft); }
.sortable th { cursor: pointer; } th[aria-sort=ascending]::after { content: " ▲"; }
th[aria-sort=descending]::after { content: " ▼"; }
"""
# Sorts the layers by the column that is clicked, or that the address names: report.html#sort=5
_SCRIPT = """
const table = document.querySelector(".sortable"), heads = [...table.querySelectorAll("th")];
function sort(column) {
  const head = heads[column], body = table.tBodies[0];
  const falling = head.getAttribute("aria-sort") !== "descending";
  heads.forEach(h => h.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const key = row => {
    const cell = row.cells[column], value = parseFloat(cell.dataset.value);
    if (column === 0) return cell.textContent;
    return Number.isNaN(value) ? -Infinity : value;
  };
  [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)], order = x < y ? -1 : x > y ? 1 : 0;
    return falling ? -order : order;
  }).forEach(row => body.append(row));
}
heads.forEach((head, column) => head.addEventListener("click", () => sort(column)));
const asked = /sort=(\\d+)/.exec(location.hash);
if (asked && heads[asked[1]]) sort(Number(asked[1]));
"""


def page(report: ErrorReport, pictures: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        report: what was measured.
        pictures: matplotlib figures by name, see `nf4.error.report.plots.pictures`.
    """
    title = f"What four bits cost: {report.model}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing may be fetched, from anywhere
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(report.scheme.label)}; measured layer by layer against the weights in "
        "the model's files, in fp32.</p>",
        _tiles(report),
        '<div class="pictures">',
        *(_figure(name, picture) for name, picture in pictures.items()),
        "</div>",
        *_perplexities(report),
        *_schemes(report),
        f"<h2>The {len(report.worst())} worst layers</h2>",
        _table("worst", report.worst()),
        "<h2>Every layer</h2><p>Click a heading to sort.</p>",
        _table("sortable", report.layers),
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _tiles(report: ErrorReport) -> str:
    ratio = report.relative / report.expected if report.expected else math.nan
    shown = [
        (f"{len(report.layers)}", "linear layers"),
        (f"{report.parameters / 1e6:,.1f} M", "weights in them"),
        (f"{report.bytes_after / 1e6:,.1f} MB", f"of {report.bytes_before / 1e6:,.1f} in 16 bits"),
        (f"{report.bits_per_weight:.3f}", "bits per weight"),
        (f"{report.relative:.4f}", f"relative error; normal weights {report.expected:.4f}"),
        (f"{ratio:.3f}", "measured over expected error"),
        (f"{report.sqnr_db:.2f} dB", "signal to quantization noise"),
    ]
    tiles = (f"<div><b>{value}</b><span>{what}</span></div>" for value, what in shown)
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _figure(name: str, picture: Any) -> str:
    drawn = io.BytesIO()
    picture.savefig(drawn, format="svg")
    data = base64.b64encode(drawn.getvalue()).decode()
    caption = _CAPTIONS[name]
    return (
        f'<figure id="{name}"><img alt="{html.escape(caption)}" '
        f'src="data:image/svg+xml;base64,{data}"><figcaption>{html.escape(caption)}</figcaption>'
        "</figure>"
    )


def _perplexities(report: ErrorReport) -> Iterable[str]:
    if not report.perplexities:
        return
    yield f"<h2>Perplexity on {report.tokens} tokens</h2>"
    first = report.perplexities[0].perplexity
    rows = [
        (p.label, f"{p.bits_per_weight:.3f}", f"{p.perplexity:.3f}", f"{p.perplexity / first:.3f}")
        for p in report.perplexities
    ]
    yield _plain(("weights", "bits per weight", "perplexity", "of fp32's"), rows)


def _schemes(report: ErrorReport) -> Iterable[str]:
    """Yield a table: a row a kind of scheme, a column a block size."""
    if not report.schemes:
        return
    yield "<h2>Other codebooks, block sizes and scales</h2>"
    yield "<p>Relative error measured on a sample of each layer; below it, where there is theory, "
    yield "what is expected of normal weights. Columns are block sizes.</p>"
    sizes = sorted({s.scheme.block_size for s in report.schemes})
    found = {(s.scheme.kind, s.scheme.block_size): s for s in report.schemes}
    rows = []
    for kind in dict.fromkeys(s.scheme.kind for s in report.schemes):
        own = [found[kind, size] for size in sizes]
        rows.append((kind, *(f"{s.relative:.4f}" for s in own)))
        if all(s.expected is not None for s in own):
            rows.append(("expected", *(f"{s.expected:.4f}" for s in own)))
    yield _plain(("scheme", *map(str, sizes)), rows)


def _plain(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return _in_table("plain", head, body)


def _table(kind: str, layers: Iterable[LayerError]) -> str:
    head = "".join(
        f'<th title="{html.escape(meaning)}">{html.escape(name)}</th>'
        for name, meaning in COLUMNS.items()
    )
    body = "".join(f"<tr>{''.join(map(_cell, *cells(row)))}</tr>" for row in layers)
    return _in_table(kind, head, body)


def _in_table(kind: str, head: str, body: str) -> str:
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, value: float | str) -> str:
    data = "" if isinstance(value, str) else f' data-value="{value!r}"'.replace("inf", "Infinity")
    return f"<td{data}>{html.escape(text)}</td>"
