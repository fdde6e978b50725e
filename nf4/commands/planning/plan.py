"""A plan: memory of each GPU, traffic and modelled time of a job, and what would fit instead."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from nf4.commands.planning.formulas import Term
from nf4.commands.planning.job import METHODS, Job
from nf4.commands.planning.memory import Row, memory_rows
from nf4.commands.planning.terms import sheet_of
from nf4.commands.planning.time import Seconds, time_rows, traffic_rows

_MOST_GPUS = 1024  # that are proposed


@dataclass(frozen=True)
class Plan:
    """What a job takes.

    Attributes:
        job: what was planned.
        terms: the names in formulas.
        memory: bytes of a GPU.
        traffic: bytes that a GPU sends in a step.
        times: modelled seconds of a step, the whole step last.
    """

    job: Job
    terms: tuple[Term, ...]
    memory: tuple[Row, ...]
    traffic: tuple[Row, ...]
    times: tuple[Seconds, ...]

    @property
    def bytes(self) -> float:
        """Bytes of a GPU, the reserve with them."""
        return sum(row.bytes for row in self.memory if row.counted)

    @property
    def sent(self) -> float:
        """Bytes that a GPU sends in a step."""
        return sum(row.bytes for row in self.traffic)

    @property
    def step_seconds(self) -> float:
        """Modelled seconds of a step."""
        return self.times[-1].seconds

    @property
    def tokens_per_second(self) -> float:
        """Modelled tokens per second of all GPUs."""
        return self.job.tokens / self.step_seconds

    @property
    def fits(self) -> bool:
        """Whether a GPU has the memory."""
        return self.bytes <= self.job.memory


@dataclass(frozen=True)
class Proposal:
    """A job that would fit.

    Attributes:
        change: what is other than asked, as options.
        plan: of it.
    """

    change: str
    plan: Plan


def make_plan(job: Job) -> Plan:
    """Return what a job takes."""
    sheet = sheet_of(job)
    memory = memory_rows(job, sheet)
    traffic = traffic_rows(job, sheet)
    times = time_rows(job, sheet, sum(row.bytes for row in traffic))
    terms = tuple(sheet.terms.values())
    return Plan(job, terms, tuple(memory), tuple(traffic), tuple(times))


def proposals(job: Job) -> list[Proposal]:
    """Return jobs that would fit where one does not, each by one change; else by several.

    A change is checkpointing, a smaller batch, another method, more GPUs. Where none is enough, all
    are made: by each method, with the fewest GPUs and as much of the batch as fits on them.
    """
    single = [found for found in map(_if_fits, _single(job)) if found is not None]
    return single or [found for method in METHODS if (found := _by_method(job, method))]


def _by_method(job: Job, method: str) -> Proposal | None:
    """Return the job of a method with checkpointing and the fewest GPUs, from those there are."""
    change = {"method": method, "checkpointing": True, "batch": 1}
    found = _first(job, ({**change, "gpus": n} for n in _gpus(job.gpus)))
    if found is None:
        return None
    fitting = found.plan.job
    batch = min(largest_batch(fitting), job.batch)
    made = replace(fitting, batch=batch)
    asked = {name: getattr(made, name) for name in ("method", "checkpointing", "batch", "gpus")}
    return _if_fits((made, {n: v for n, v in asked.items() if v != getattr(job, n)}))


def largest_batch(job: Job) -> int:
    """Return the most sequences that fit, 0 if not one does."""
    if not make_plan(replace(job, batch=1)).fits:
        return 0
    low, high = 1, 2
    while high <= 2**20 and make_plan(replace(job, batch=high)).fits:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if make_plan(replace(job, batch=middle)).fits:
            low = middle
        else:
            high = middle
    return low


def _single(job: Job) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Yield jobs with one change, or with checkpointing a larger batch; and the change."""
    if not job.checkpointing:
        yield replace(job, checkpointing=True), {"checkpointing": True}
    batch = largest_batch(job)
    if 0 < batch < job.batch:
        yield replace(job, batch=batch), {"batch": batch}
    larger = largest_batch(replace(job, checkpointing=True))
    if batch < larger < job.batch:
        change: dict[str, Any] = {"checkpointing": True, "batch": larger}
        yield replace(job, **change), change
    for method in METHODS:
        if method != job.method:
            yield from _possible(job, {"method": method})
    more = _first(job, ({"gpus": n} for n in _gpus(2 * job.gpus)))
    if more:
        yield more.plan.job, {"gpus": more.plan.job.gpus}


def _possible(job: Job, change: dict[str, Any]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Yield a changed job if it can be."""
    try:
        yield replace(job, **change), change
    except ValueError:  # heads that do not divide among so many GPUs
        return


def _first(job: Job, changes: Iterator[dict[str, Any]]) -> Proposal | None:
    """Return the first change by which a job fits."""
    for change in changes:
        for one in _possible(job, change):
            found = _if_fits(one)
            if found:
                return found
    return None


def _if_fits(one: tuple[Job, dict[str, Any]]) -> Proposal | None:
    job, change = one
    plan = make_plan(job)
    return Proposal(_said(change), plan) if plan.fits else None


def _said(change: dict[str, Any]) -> str:
    """Return a change as options of the command."""
    said = (f"--{n}" if value is True else f"--{n} {value}" for n, value in change.items())
    return " ".join(said)


def _gpus(first: int) -> Iterator[int]:
    """Yield a number of GPUs and its doubles."""
    while first <= _MOST_GPUS:
        yield first
        first *= 2


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan, whether it fits, and what would instead, for JSON."""
    fits = plan.fits
    return {
        "format": "nf4-plan-1",
        "job": {**asdict(plan.job), "parameters": plan.job.sizes.parameters},
        "terms": [asdict(term) for term in plan.terms],
        "memory": [asdict(row) for row in plan.memory],
        "memory_bytes": plan.bytes,
        "traffic": [asdict(row) for row in plan.traffic],
        "traffic_bytes": plan.sent,
        "modelled_seconds": [asdict(row) for row in plan.times],
        "modelled_step_seconds": plan.step_seconds,
        "modelled_tokens_per_second": plan.tokens_per_second,
        "fits": fits,
        "largest_batch": largest_batch(plan.job),
        "would_fit": []
        if fits
        else [
            {
                "change": one.change,
                "memory_bytes": one.plan.bytes,
                "modelled_step_seconds": one.plan.step_seconds,
                "modelled_tokens_per_second": one.plan.tokens_per_second,
            }
            for one in proposals(plan.job)
        ],
    }
