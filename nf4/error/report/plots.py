"""The report's pictures."""

from collections.abc import Callable
from typing import Any

import numpy as np

from nf4.codebook import NF4_LEVELS
from nf4.error.codebooks import CODEBOOKS
from nf4.error.distributions import Normal, scales
from nf4.error.report.measure import ErrorReport, SchemeError
from nf4.tools.figures import COLORS, figure

Figure = Any
# Colour and line of each codebook; the signed ones are dotted
STYLES = {
    name: {
        "color": (COLORS[0], *COLORS[2:8], *COLORS[6:8])[i],
        "linestyle": ":" if name.startswith("bof4s") else "-",
        "marker": "s" if name.startswith("bof4s") else "o",
    }
    for i, name in enumerate(CODEBOOKS)
}


def error_by_depth(report: ErrorReport) -> Figure:
    """Draw the relative error of each layer, in the model's order, a colour for each kind."""
    made, ax = figure("Relative error of each layer")
    kinds = list(dict.fromkeys(row.kind for row in report.layers))
    for i, kind in enumerate(kinds):
        points = [row.error.relative for row in report.layers if row.kind == kind]
        ax.plot(range(len(points)), points, **_look(i), markersize=3, linewidth=1, label=kind)
    ax.axhline(report.expected, color="black", linestyle="--", linewidth=1)
    ax.annotate(
        f"normal weights {report.expected:.4f}",
        (1, report.expected),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize="small",
    )
    ax.set_xlabel("depth: how many layers of this kind come before")
    ax.set_ylabel("relative error |Ŵ - W| / |W|")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if len(kinds) <= 16:
        ax.legend(frameon=False, ncols=1 + (len(kinds) > 4), fontsize="small")
    return made


def _look(i: int) -> dict[str, str]:
    """Return the colour and the marker of the i-th kind of layer."""
    return {"color": COLORS[i % len(COLORS)], "marker": "o^sD"[i // len(COLORS) % 4]}


def weights_over_codebook(report: ErrorReport) -> Figure:
    """Draw how weights over the largest of their block spread, and where the levels are."""
    made, ax = figure("Weights over the largest magnitude of their block, and the levels of NF4")
    bins = len(report.histogram)
    edges = np.linspace(-1, 1, bins + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    density = np.array(report.histogram) * bins / 2
    ax.stairs(density, edges, fill=True, color=COLORS[5], alpha=0.6, label="this model")
    ax.plot(middle, _density_of_normal(middle, report.scheme.block_size), color=COLORS[0],
            linewidth=1.5, label="normal weights")  # fmt: skip
    for i, level in enumerate(NF4_LEVELS):
        ax.axvline(level, color=COLORS[1], linewidth=0.8, label="levels" if i == 0 else None)
    ax.set_ylim(0, 1.15 * max(density[2:-2].max(), 0.1))
    ax.set_xlabel(f"w / absmax, block size {report.scheme.block_size}")
    ax.set_ylabel("density")
    ax.legend(frameon=False, loc="upper left")
    return made


def _density_of_normal(t: np.ndarray[Any, Any], block_size: int) -> np.ndarray[Any, Any]:
    """Return the density of x / M inside (-1, 1), of all but the largest of each block."""
    f = Normal()
    m, weight, *_ = scales(f, block_size, 0.2)
    inside = weight * m / (f.moment(0, m) - f.moment(0, -m))
    share = (block_size - 1) / block_size
    return np.asarray(share * f.density(np.outer(t, m)) @ inside)


def theory_and_measurement(report: ErrorReport) -> Figure:
    """Draw where layers leave theory: the ratio over kurtosis; and every scheme against theory."""
    made, (left, right) = figure("Theory against measurement", panels=2)
    kinds = list(dict.fromkeys(row.kind for row in report.layers))
    for i, kind in enumerate(kinds):
        rows = [r for r in report.layers if r.kind == kind and r.error.rms]
        left.scatter(
            [r.error.kurtosis for r in rows],
            [r.error.relative / r.error.expected.relative for r in rows],
            s=14,
            **_look(i),
            label=kind,
        )
    left.axhline(1, color="black", linestyle="--", linewidth=1)
    left.set_xscale("symlog", linthresh=1)
    lowest = min((row.error.kurtosis for row in report.layers if row.error.rms), default=0.0)
    left.set_xlim(left=min(lowest, -0.1) - 0.1)
    left.set_xlabel("excess kurtosis (0: normal)")
    left.set_ylabel("measured / expected relative error, a point a layer")
    if len(kinds) <= 16:
        left.legend(frameon=False, fontsize="x-small", ncols=1 + (len(kinds) > 8))
    known = [s for s in report.schemes if s.expected is not None]
    for name, own in _by_codebook(known).items():
        points = [(s.expected, s.relative) for s in own]
        style = {**STYLES[name], "linestyle": "none"}
        right.plot(*zip(*points, strict=True), **style, markersize=4, label=name)
    ends = [min(s.expected or 1 for s in known), max(s.relative for s in known)]
    right.plot(ends, ends, color="black", linestyle="--", linewidth=1)
    right.set_xlabel("expected relative error, normal weights")
    right.set_ylabel("measured, a point a block size")
    right.legend(frameon=False, fontsize="small")
    return made


def _by_codebook(schemes: list[SchemeError]) -> dict[str, list[SchemeError]]:
    names = dict.fromkeys(s.scheme.codebook for s in schemes)
    return {
        name: [s for s in schemes if s.scheme.codebook == name and not s.scheme.double_quant]
        for name in names
    }


def error_over_bits(report: ErrorReport) -> Figure:
    """Draw the error over bits per weight, a line a way to quantize, a point a block size."""
    made, ax = figure("Error against bits per weight, block sizes 32 to 4096")
    for name in CODEBOOKS[1:]:
        style = {**STYLES[name], "linewidth": 1, "alpha": 0.8}
        _line(ax, report, name, lambda s: not s.scheme.double_quant, name, style)
    scales_of = {
        "absmax": ("NF4", COLORS[0]),
        "mse": ("NF4, least squares", COLORS[1]),
    }
    for scale, (label, color) in scales_of.items():
        for double_quant in (False, True):
            _line(
                ax,
                report,
                "nf4",
                lambda s, scale=scale, double=double_quant: (  # type: ignore[misc]
                    (s.scheme.scale, s.scheme.double_quant) == (scale, double)
                ),
                label + ", double quantization" * double_quant,
                {
                    "color": color,
                    "marker": "o",
                    "linewidth": 2.5,
                    "linestyle": "--" if double_quant else "-",
                },
            )
    ax.set_xscale("log")
    ticks = [4 + 2.0**-i for i in range(9)]
    ax.set_xticks([tick - 4 for tick in ticks], [f"{tick:.4g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel("bits per weight, scales included (logarithmic in what is beyond 4)")
    ax.set_ylabel("relative error |Ŵ - W| / |W|")
    ax.legend(frameon=False, fontsize="small", ncols=2)
    return made


def _line(
    ax: Any,
    report: ErrorReport,
    codebook: str,
    wanted: Callable[[SchemeError], bool],
    label: str,
    style: dict[str, Any],
) -> None:
    own = [s for s in report.schemes if s.scheme.codebook == codebook and wanted(s)]
    points = sorted((s.bits_per_weight - 4, s.relative) for s in own)
    ax.plot(*zip(*points, strict=True), markersize=3, label=label, **style)


def perplexity_bars(report: ErrorReport) -> Figure:
    """Draw the perplexity under each scheme, the least first."""
    made, ax = figure(f"Perplexity on {report.tokens} tokens")
    rows = sorted(report.perplexities, key=lambda row: -row.perplexity)
    made.set_size_inches(8, max(3.0, 0.28 * len(rows) + 1))
    colors = [COLORS[6] if row.label == "fp32" else COLORS[0] for row in rows]
    ax.barh([row.label for row in rows], [row.perplexity for row in rows], color=colors)
    for i, row in enumerate(rows):
        ax.annotate(f" {row.perplexity:.2f}", (row.perplexity, i), va="center", fontsize="small")
    ax.set_xlim(0, 1.1 * max(row.perplexity for row in rows))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", labelsize="small")
    ax.set_xlabel("perplexity (lower is better)")
    return made


def pictures(report: ErrorReport) -> dict[str, Figure]:
    """Return the pictures that a report has data for, by the names of their files."""
    found = {"layers": error_by_depth(report), "weights": weights_over_codebook(report)}
    if report.schemes:
        found["theory"] = theory_and_measurement(report)
        found["bits"] = error_over_bits(report)
    if report.perplexities:
        found["perplexity"] = perplexity_bars(report)
    return found
