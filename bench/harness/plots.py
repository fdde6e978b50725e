"""Pictures of what was measured: rooflines, and time and speed-up over the rows of x."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nf4.bench.harness.circumstances import slug
from nf4.bench.harness.results import Results, Row
from nf4.tools.figures import COLORS, figure

MARKERS = "osD^vP*X"
DPI = 120
OURS = "nf4"


def draw(found: Results, folder: Path) -> list[Path]:
    """Draw every picture that the results allow, and return their files.

    A roofline for each dtype in which something was multiplied, with our function of each case; and
    for all that was measured for several M, the time over M, and each function's time over ours.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, made in (*_rooflines(found), *_sweeps(found)):
        path = folder / f"{slug(name)}.png"
        made.savefig(path, dpi=DPI)
        written.append(path)
    return written


def _rooflines(found: Results) -> Iterator[tuple[str, Any]]:
    """Yield a name and a picture for each dtype in which something was multiplied."""
    rows: dict[str, list[tuple[str, Row]]] = {}
    for op, section in found.sections.items():
        for row in section.rows:
            if row.flops:
                rows.setdefault(row.dtype, []).append((op, row))
    for dtype, own in rows.items():
        yield f"roofline-{dtype}", _roofline(found, dtype, own)


def _roofline(found: Results, dtype: str, rows: list[tuple[str, Row]]) -> Any:
    """Return a picture of ours under the ceilings of the run that measured the last of them."""
    made, ax = figure(f"{found.device}: roofline, {dtype}")
    ceilings = found.sections[rows[-1][0]].ceilings
    unit, name = (1e12, "TFLOP/s") if ceilings.products[dtype] >= 1e12 else (1e9, "GFLOP/s")
    ops = list(dict.fromkeys(op for op, _ in rows))
    for i, op in enumerate(ops):
        own = [row for other, row in rows if other == op]
        who, _ = next(iter(own[0].timings.items()))
        ax.plot(
            [row.flops / row.moved for row in own],
            [1e6 * row.flops / next(iter(row.timings.values())).median / unit for row in own],
            ls="",
            alpha=0.85,
            label=op if who == OURS else f"{op}, {who}",
            **_style(i),
        )
    intensities = [row.flops / row.moved for _, row in rows]
    x = np.geomspace(min(intensities) / 4, max(intensities) * 2, 200)
    roof = np.minimum(x * ceilings.copy, ceilings.products[dtype]) / unit
    label = (
        f"measured ceilings:\ncopy {ceilings.copy / 1e9:.4g} GB/s,\nproduct {roof[-1]:.3g} {name}"
    )
    ax.plot(x, roof, color="black", lw=1.5, label=label)
    _logarithmic(ax.xaxis, ax.set_xscale)
    _logarithmic(ax.yaxis, ax.set_yscale)
    ax.set_xlabel("operations per byte that must be moved")
    ax.set_ylabel(f"achieved, {name}")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return made


def _style(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "ms": 5.5}


def _logarithmic(axis: Any, set_scale: Any) -> None:
    """Make an axis logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    set_scale("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _sweeps(found: Results) -> Iterator[tuple[str, Any]]:
    """Yield a name and a picture for each series of cases that differ in M alone."""
    for op, section in found.sections.items():
        series: dict[tuple[tuple[str, str], ...], list[Row]] = {}
        for row in section.rows:
            if "M" in row.labels:
                fixed = tuple((k, v) for k, v in row.labels.items() if k not in ("M", "ours"))
                series.setdefault(fixed, []).append(row)
        for fixed, rows in series.items():
            if len(rows) > 1:
                rows.sort(key=lambda row: int(row.labels["M"]))
                words = [v if k in ("W", "dtype") else f"{k} {v}" for k, v in fixed]
                title = f"{found.device}: {section.title}, {', '.join(words)}"
                yield "-".join((op, *words)).replace("×", "x"), _sweep(title, rows)


def _sweep(title: str, rows: list[Row]) -> Any:
    """Return a picture of time and speed-up over M."""
    made, (left, right) = figure(title, panels=2)
    names = list(dict.fromkeys(name for row in rows for name in row.timings))
    for i, name in enumerate(names):
        own = [row for row in rows if name in row.timings]
        m = [int(row.labels["M"]) for row in own]
        timings = [row.timings[name] for row in own]
        style = {**_style(i), "lw": 2.2 if i == 0 else 1.3}
        left.plot(m, [t.median for t in timings], label=name, **style)
        spread = [[t.p20 for t in timings], [t.p80 for t in timings]]
        left.fill_between(m, *spread, color=style["color"], alpha=0.15, lw=0)
        first = [next(iter(row.timings.values())).median for row in own]
        right.plot(m, [t.median / o for t, o in zip(timings, first, strict=True)], **style)
    ms = [int(row.labels["M"]) for row in rows]
    left.plot(ms, [row.ceiling for row in rows], "k:", label="measured ceilings")
    left.set_ylabel("time of a call, µs")
    right.set_ylabel(f"time / time of {names[0]}")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(ms, ms)
        ax.minorticks_off()
        ax.set_xlabel("rows of x, M")
        _logarithmic(ax.yaxis, ax.set_yscale)
    style = {"loc": "outside lower center", "ncols": 4, "fontsize": 8, "frameon": False}
    made.legend(**style, title="bands: 20th to 80th percentile", title_fontsize=8)
    return made
