"""Tables of a comparison, in Markdown."""

from typing import Any

from nf4.bench.harness.markdown import heading, table
from nf4.commands.comparison.methods import METHODS

FORMAT = "nf4-compare-1"
NONE = "–"


def tables(data: dict[str, Any]) -> str:
    """Return what `nf4.commands.comparison.run.run_compare` found as Markdown."""
    columns = ["method", "trainable parameters", "model", "peak memory"]
    columns += ["seconds a step (p20–p80)", "held-out perplexity, before → after"]
    columns += ["adapter on disk", "reloaded", "learning rate"]
    cells = [_cells(name, found) for name, found in data["methods"].items()]
    lines = heading(f"{data['model']}: fine-tuned by each method, {data['dtype']}", data)
    lines += [_how(data), "", *table(columns, cells), *_notes(data)]
    return "\n".join(lines) + "\n"


def summary(data: dict[str, Any]) -> list[str]:
    """Return the lines of a shorter table, for the guide to benchmarks."""
    title = f"{data['model']} in {data['dtype']}, {data['steps']} steps of {data['length']} tokens"
    columns = [title, "trainable parameters", "peak memory", "seconds a step"]
    columns += ["held-out perplexity", "adapter on disk"]
    rows = []
    for name, found in data["methods"].items():
        label, trained, _, peak, seconds, _, adapter, *_ = _cells(name, found)
        perplexity = f"{found['perplexity_after']:.2f}"
        rows.append([label, trained, peak, seconds.partition(" ")[0], perplexity, adapter])
    return [f"{data['device']}:", "", *table(columns, rows)]


def _cells(name: str, found: dict[str, Any]) -> list[str]:
    seconds, reloaded, lr = (found[k] for k in ("step_seconds", "reloaded_logits_equal", "lr"))
    return [
        METHODS[name].label,
        f"{found['trainable']:,}",
        size(found["model_bytes"]),
        size(found["peak_bytes"]),
        NONE if seconds is None else "{median:.2f} ({p20:.2f}–{p80:.2f})".format(**seconds),
        f"{found['perplexity_before']:.2f} → {found['perplexity_after']:.2f}",
        size(found["adapter_bytes"]),
        NONE if reloaded is None else "equal" if reloaded else "different",
        NONE if lr is None else f"{lr:g}",
    ]


def size(count: int | None) -> str:
    """Return bytes in MB, or in kB below one; a dash for None."""
    if count is None:
        return NONE
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _how(data: dict[str, Any]) -> str:
    """Return how the figures came about."""
    batches = "the same batches" if _alike(data) else "different batches"
    held = (
        "of PyTorch's allocator" if data["threads"] is None else "of the process's resident memory"
    )
    return (
        f"{data['steps']} steps of {data['batch']}×{data['length']} tokens of {data['text']}, "
        f"{batches} in the same order, seed {data['seed']}; AdamW, at a peak learning rate picked "
        f"for each method; LoRA with r = {data['r']} on every linear layer but the output layer. "
        f"Each method has a process of its own. Peak memory is the bytes of model and adapter, and "
        f"the most that training steps held beyond, {held}; the interpreter and its libraries are "
        f"left out. Seconds are the median of all steps but the first. Perplexity is of "
        f"{data['held_out_tokens']:,} held-out tokens, the adapter's size that of its folder; "
        f"'reloaded' says whether it gives a fresh model the same logits."
    )


def _alike(data: dict[str, Any]) -> bool:
    return len({found["batches"] for found in data["methods"].values()}) == 1


def _notes(data: dict[str, Any]) -> list[str]:
    """Return what must be known of each method, why memory is missing, and what failed."""
    lines = [f"- {METHODS[name].label}: {METHODS[name].note}." for name in data["methods"]]
    for name, found in data["methods"].items():
        if found["peak_bytes"] is None:
            lines.append(f"- {METHODS[name].label}, no peak memory: {found['peak_missing']}.")
    lines += [f"- {METHODS[name].label}: failed: {why}" for name, why in data["failed"].items()]
    return lines
