"""A plan as text: tables of figures with their formulas, and whether it fits."""

from collections.abc import Sequence

from nf4.commands.planning.job import METHODS
from nf4.commands.planning.plan import Plan, largest_batch, proposals


def text_of(plan: Plan, name: str) -> str:
    """Return a plan as text.

    Args:
        plan: what is told.
        name: of the model, as it was asked for.
    """
    lines = [_title(plan, name), "", *_memory(plan), "", *_traffic(plan), "", *_times(plan), ""]
    lines += ["Where"]
    named = [
        (term.name, _number(term.value), term.meaning + (f": {term.formula}" * bool(term.formula)))
        for term in plan.terms
    ]
    return "\n".join([*lines, *_table(named), "", *_verdict(plan), ""])


def size(count: float) -> str:
    """Return bytes in GB, in MB below one."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def seconds(value: float) -> str:
    """Return seconds, in ms below one."""
    return f"{value:,.2f} s" if value >= 1 else f"{1e3 * value:,.2f} ms"


def _title(plan: Plan, name: str) -> str:
    job = plan.job
    how = f"{job.method}: {METHODS[job.method]}" if job.gpus > 1 else "nothing is shared"
    shared = "all GPUs together" if job.method == "tp" else "each GPU"
    return (
        f"{name}, {job.sizes.parameters / 1e9:,.2f} billion parameters, in NF4 with adapters of "
        f"rank {job.rank}, {job.dtype}\n"
        f"{_count(job.gpus, 'GPU')} of {size(job.memory)}; {how}\n"
        f"{_count(job.batch, 'sequence')} of {job.length} tokens for {shared}, {job.tokens:,} "
        f"tokens a step; {job.optimizer}, {job.attention}, "
        f"{'with' if job.checkpointing else 'without'} checkpointing"
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _memory(plan: Plan) -> list[str]:
    rows = [
        (
            row.name,
            size(row.bytes) if row.counted else f"({size(row.bytes)})",
            row.formula + (f"   [{row.note}]" if row.note else ""),
        )
        for row in plan.memory
    ]
    total = ("together", size(plan.bytes), "what is in parentheses is not counted")
    return ["Memory of each GPU, calculated", *_table([*rows, total])]


def _traffic(plan: Plan) -> list[str]:
    title = "Sent by each GPU in a step, calculated"
    if not plan.traffic:
        return [title, "  nothing: one GPU"]
    rows = [
        (row.name, size(row.bytes), row.formula + (f"   [{row.note}]" if row.note else ""))
        for row in plan.traffic
    ]
    return [title, *_table([*rows, ("together", size(plan.sent), "")])]


def _times(plan: Plan) -> list[str]:
    rows = [
        (row.name, seconds(row.seconds), row.formula + (f"   [{row.note}]" if row.note else ""))
        for row in plan.times
    ]
    rows.append(("modelled tokens", f"{plan.tokens_per_second:,.0f} / s", "of all GPUs"))
    return ["Time of a step, modelled and not measured", *_table(rows)]


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return lines of three columns, the second one flush right."""
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"  {a:<{first}}  {b:>{second}}  {c}".rstrip() for a, b, c in rows]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


def _verdict(plan: Plan) -> list[str]:
    job, needed = plan.job, plan.bytes
    most = largest_batch(job)
    if plan.fits:
        left = size(job.memory - needed)
        return [f"Fits: {size(needed)} of {size(job.memory)}, {left} left; up to --batch {most}."]
    lines = [f"Does not fit: {size(needed)} of {size(job.memory)}. What would:"]
    found = [
        (
            one.change,
            size(one.plan.bytes),
            f"modelled {seconds(one.plan.step_seconds)} a step, "
            f"{one.plan.tokens_per_second:,.0f} tokens / s",
        )
        for one in proposals(job)
    ]
    if not found:
        return [*lines, "  nothing up to 1,024 GPUs: a shorter --length, or GPUs with more memory"]
    return [*lines, *_table(found), f"  or GPUs of {size(needed)}"]
