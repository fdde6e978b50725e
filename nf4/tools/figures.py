"""What all pictures share: a figure without a window, and how axes look."""

from typing import Any

# Told apart by colour-blind readers too (Okabe and Ito), the most used first
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8860B")


def figure(title: str, panels: int = 1) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes, a list of them if there are several panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(8, 4.5) if panels == 1 else (11, 4.5), layout="constrained")
    FigureCanvasAgg(made)
    axes = [made.add_subplot(1, panels, i + 1) for i in range(panels)]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    if panels == 1:
        axes[0].set_title(title)
        return made, axes[0]
    made.suptitle(title)
    return made, axes
