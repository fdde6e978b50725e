"""The demo's tables, for a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nf4.commands.demo.run import DemoResult


def print_result(result: DemoResult, console: Console) -> None:
    """Print what the demo measured as tables."""
    console.print(_size_table(result))
    console.print(_error_table(result))
    console.print(_perplexity_table(result))
    console.print(_training_table(result))
    console.print("\n[bold]The merged model continues the held-out text[/bold]")
    console.print(f"[dim]{escape(result.prompt)}[/dim]{escape(result.generated)}\n")
    console.print(f"Written in {result.seconds:.0f} s:")
    for path in result.files.values():
        console.print(f"  {path}", highlight=False, soft_wrap=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _size_table(r: DemoResult) -> Table:
    table = _table(f"{escape(r.model)}: size", "", "parameters", "before", "after", "bits/weight")
    table.add_row(
        f"{r.layers} linear layers",
        f"{r.quantized_parameters:,}",
        _megabytes(r.linear_bytes_before),
        _megabytes(r.linear_bytes_after),
        f"{r.bits_per_weight:.3f}",
    )
    table.add_row(
        "whole model",
        f"{r.parameters:,}",
        _megabytes(r.model_bytes_before),
        _megabytes(r.model_bytes_after),
        f"{8 * r.model_bytes_after / r.parameters:.3f}",
    )
    table.caption = f"quantized in {r.quantize_seconds:.2f} s; embeddings and lm_head stay fp32"
    return table


def _error_table(r: DemoResult) -> Table:
    table = _table("Relative error of the weights", "layer", "count", "mean", "max")
    for row in r.error_by_kind:
        table.add_row(escape(row.kind), str(row.layers), f"{row.mean:.4f}", f"{row.largest:.4f}")
    return table


def _perplexity_table(r: DemoResult) -> Table:
    table = _table("Perplexity (lower is better)", "text", "fp32", "NF4", "NF4 + QLoRA")
    wiki = f"Wikipedia, {r.perplexity_tokens} tokens"
    table.add_row(wiki, f"{r.perplexity_fp32:.2f}", f"{r.perplexity_nf4:.2f}", "")
    tuned = f"[bold]{r.held_out_tuned:.2f}[/bold]"
    table.add_row("held-out text", f"{r.held_out_fp32:.2f}", f"{r.held_out_nf4:.2f}", tuned)
    return table


def _training_table(r: DemoResult) -> Table:
    table = _table("Fine-tuning", "what", "value")
    table.add_row("trainable parameters", f"{r.trainable_parameters:,}")
    table.add_row(
        f"loss, first → last of {r.steps} steps", f"{r.losses[0]:.3f} → {r.losses[-1]:.3f}"
    )
    table.add_row("tokens per second", f"{r.tokens_per_second:.0f}")
    table.add_row("one step, fp32 + LoRA (PEFT)", f"{r.step_seconds_fp32:.2f} s")
    table.add_row("one step, NF4 + LoRA", f"{r.step_seconds_nf4:.2f} s")
    table.add_row("NF4 / fp32, fastest of five steps", f"{r.step_ratio:.2f}")
    equal = "equal" if r.reloaded_logits_equal else "[red]different[/red]"
    table.add_row("logits after reloading the adapter", equal)
    table.add_row("largest change of a logit by merging", f"{r.merged_logits_difference:.1e}")
    return table
