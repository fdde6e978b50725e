"""The demo's two pictures."""

from collections.abc import Sequence
from pathlib import Path

from nf4.error.measured import LayerError
from nf4.tools.figures import figure


def plot_loss(losses: Sequence[float], path: Path) -> None:
    """Draw the training loss against the step."""
    picture, axes = figure("QLoRA fine-tuning on a 4-bit base: training loss")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="each step")
    width = max(1, min(9, len(losses) // 4))
    smooth = [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
    middle = [i + (width + 1) / 2 for i in range(len(smooth))]
    axes.plot(middle, smooth, color="tab:blue", linewidth=2, label=f"mean of {width}")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    picture.savefig(path, dpi=120)


def plot_error(rows: Sequence[LayerError], path: Path) -> None:
    """Draw the relative error of every layer, in the model's order, a colour for each kind."""
    picture, axes = figure("NF4 quantization error of each layer")
    kinds = list(dict.fromkeys(row.kind for row in rows))
    for kind in kinds:
        points = [r.error.relative for r in rows if r.kind == kind]
        axes.plot(range(len(points)), points, marker="o", markersize=3, linewidth=1, label=kind)
    axes.set_xlabel("depth: how many layers of this kind come before")
    axes.set_ylabel("relative error |Ŵ - W| / |W|")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, ncols=2, fontsize="small")
    picture.savefig(path, dpi=120)
