"""The picture of a comparison: what was reached for how many parameters, and how it got there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nf4.commands.comparison.methods import METHODS
from nf4.commands.comparison.report import size
from nf4.tools.figures import COLORS, figure

SMALLEST, LARGEST = 60.0, 600.0  # of a marker's area, in square points


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw held-out perplexity over trainable parameters, and the losses of training.

    Args:
        data: what `nf4.commands.comparison.run.run_compare` found.
        path: the PNG file to write.
    """
    picture(data).savefig(path, dpi=120)


def picture(data: dict[str, Any]) -> Any:
    """Return the figure that `draw` writes."""
    title = f"{data['model']}, {data['steps']} steps of {data['batch']}×{data['length']} tokens"
    made, (left, right) = figure(title, panels=2)
    colors = dict(zip(METHODS, COLORS, strict=False))
    trained = {name: found for name, found in data["methods"].items() if found["losses"]}
    _reached(left, data["methods"], trained, colors)
    for name, found in trained.items():
        _loss(right, found["losses"], colors[name])
    right.set_xlabel("step")
    right.set_ylabel("training loss, nats per token")
    right.xaxis.get_major_locator().set_params(integer=True)
    style = {"loc": "outside lower center", "ncols": 3, "fontsize": 9, "frameon": False}
    style["title"] = "area of a point: peak memory"
    made.legend(*left.get_legend_handles_labels(), markerscale=0.5, **style)
    return made


def _reached(
    ax: Any, found: dict[str, Any], trained: dict[str, Any], colors: dict[str, str]
) -> None:
    """Draw a point a method, and a line for what the untrained models reach."""
    before = {METHODS[name].quantized: f["perplexity_before"] for name, f in found.items()}
    for quantized, value in before.items():
        label = f"{'4-bit' if quantized else 'dense'}, not trained: {value:.1f}"
        ax.axhline(value, color="black", lw=1.2, ls="--" if quantized else ":", label=label)
    peaks = [f["peak_bytes"] for f in trained.values() if f["peak_bytes"] is not None]
    for name, f in trained.items():
        share = 0.3 if f["peak_bytes"] is None else f["peak_bytes"] / max(peaks)
        memory = "" if f["peak_bytes"] is None else f", {size(f['peak_bytes'])}"
        ax.scatter(
            f["trainable"],
            f["perplexity_after"],
            s=max(SMALLEST, LARGEST * share),
            color=colors[name],
            alpha=0.75,
            label=f"{METHODS[name].label}{memory}",
        )
    if trained:
        ax.set_xscale("log")
        ax.margins(x=0.2, y=0.15)
    ax.set_xlabel("trainable parameters")
    ax.set_ylabel("held-out perplexity")


def _loss(ax: Any, losses: Sequence[float], color: str) -> None:
    """Draw each step's loss faintly, and a running mean."""
    steps = range(1, len(losses) + 1)
    ax.plot(steps, losses, color=color, alpha=0.2)
    width = max(1, min(9, len(losses) // 4))
    means = [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
    middle = [i + (width + 1) / 2 for i in range(len(means))]
    ax.plot(middle, means, color=color, lw=2)
