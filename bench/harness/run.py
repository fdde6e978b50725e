"""Measure: the ceilings first, then every case of every op, and write each op as it is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from nf4.bench.harness import results
from nf4.bench.harness.cases import Case, MismatchError, Options, relative_error
from nf4.bench.harness.ceilings import Ceilings, measure_ceilings
from nf4.bench.harness.circumstances import circumstances, device_name
from nf4.bench.harness.measure import Function, interleaved
from nf4.bench.harness.request import Request
from nf4.tools.cost import device_of

# A result that is no result: formats of 4 bits lie 0.1 from a dense weight, and nearer each other
PEER_ERROR = 0.2
SMALL = (64, 128)
DISTURBED = 1.25  # spread of the ceilings
Key = frozenset[tuple[str, str]]


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        path: the file written.
        measured: what this run added to it.
        refused: ops that were not timed, and why.
        wrong: whether one of them gave a wrong result.
        spread: of the ceilings.
    """

    path: Path
    measured: results.Results
    refused: dict[str, str] = field(default_factory=dict)
    wrong: bool = False
    spread: float = 1.0

    @property
    def disturbed(self) -> bool:
        """Whether other work seems to have taken part of the machine."""
        return self.spread > DISTURBED


@dataclass(frozen=True)
class Plan:
    """What is going to be measured: a request that has been checked.

    Attributes:
        device: where.
        threads: of a CPU; None for PyTorch's.
        modules: by op.
        options: by op.
        path: the file to write.
    """

    device: torch.device
    threads: int | None
    modules: dict[str, Any]
    options: dict[str, Options]
    path: Path


def plan(request: Request, out: str | None = None) -> Plan:
    """Check a request.

    Args:
        request: ops, sizes, device.
        out: file to write; one named by the device by default.

    Raises:
        ValueError: what was asked for is not possible, or the file holds something else.
    """
    device = request.chosen_device()
    modules = {op: import_module(f"nf4.bench.bench_{op}") for op in request.chosen_ops()}
    options = {op: request.options(m.DEFAULTS, m.ON_GPU) for op, m in modules.items()}
    with _on(device, request.threads):
        name = device_name(device)
    path = results.default_path(name) if out is None else Path(out)
    results.check_target(path, name)
    return Plan(device, request.threads, modules, options, path)


def run(plan: Plan, progress: Callable[[str], None] = lambda name: None) -> Outcome:
    """Measure, and write each op into the file as soon as it is done.

    Args:
        plan: see `plan`.
        progress: called after the ceilings and after each op, with the name of what comes next.

    Returns:
        An `Outcome`. An op that is refused leaves the others, and what was in the file of it.

    Raises:
        OSError: the file cannot be written.
    """
    with _on(plan.device, plan.threads), _seeded(plan.device):
        around = circumstances(plan.device)
        name, ops = around["device"], list(plan.modules)
        dtypes = [dtype for own in plan.options.values() for dtype in own.dtypes]
        ceilings = measure_ceilings(plan.device, ["bf16", "fp32", *dtypes])
        progress(ops[0])
        outcome = Outcome(plan.path, results.Results(name, {}), spread=ceilings.spread)
        for op, after in zip(ops, [*ops[1:], ""], strict=True):
            module, options = plan.modules[op], plan.options[op]
            try:
                rows = time_op(module, options, ceilings)
            except (ValueError, torch.OutOfMemoryError) as error:
                outcome.refused[op] = " ".join(str(error).split())
                outcome.wrong |= isinstance(error, MismatchError)
            else:
                section = results.Section(module.TITLE, around, ceilings, _as_json(options), rows)
                outcome.measured.sections[op] = section
                results.add(plan.path, name, {op: section})
            progress(after)
    return outcome


def time_op(module: Any, options: Options, ceilings: Ceilings) -> list[results.Row]:
    """Return the timings of all cases of an op, each checked first.

    Raises:
        ValueError: a result of ours is wrong, or a size is none that the op takes.
    """
    small = small_functions(module, options)
    return [
        time_case(case, ceilings, options, small.get(key_of(case), {}))
        for case in module.make(options)
    ]


def _as_json(options: Options) -> dict[str, Any]:
    return {
        "shapes": [list(shape) for shape in options.shapes],
        "rows": list(options.rows),
        "rows_of": [[*shape, *m] for shape, m in options.rows_of.items()],
        "ranks": list(options.ranks),
        "dtypes": list(options.dtypes),
        "rounds": options.rounds,
    }


def small_functions(module: Any, options: Options) -> dict[Key, dict[str, Function]]:
    """Return an op's functions on a small weight, by what they share with those to time."""
    if options.device.type != "cpu":
        return {}
    rows = dict.fromkeys([*options.rows, *(m for own in options.rows_of.values() for m in own)])
    few = replace(options, shapes=[SMALL], rows=list(rows), rows_of={})
    return {key_of(case): usable(case, options.device)[0] for case in module.make(few)}


def key_of(case: Case) -> Key:
    """Return the labels of a case but for those that follow from the weight's size."""
    return frozenset((k, v) for k, v in case.labels.items() if k not in ("W", "ours"))


def time_case(
    case: Case, ceilings: Ceilings, options: Options, small: dict[str, Function]
) -> results.Row:
    """Return the timings of a case, and why a peer has none; see `interleaved` for small."""
    functions, absent = usable(case, options.device)
    modelled = None
    if options.device.type == "cuda":
        model = device_of(options.device)
        modelled = 1e6 * max(case.moved / model.bandwidth, case.flops / model.flops)
    return results.Row(
        case.labels,
        case.dtype,
        case.moved,
        case.flops,
        ceilings.microseconds(case.moved, case.flops, case.dtype),
        modelled,
        interleaved(functions, options.device, options.rounds, small),
        absent,
    )


def usable(case: Case, device: torch.device) -> tuple[dict[str, Function], dict[str, str]]:
    """Call every function once.

    Returns:
        The functions that can be timed; and those of others that cannot, with the reason.

    Raises:
        MismatchError: a function of ours returned what it should not.
    """
    good, absent = {}, {}
    for name, function in case.functions.items():
        ours = name.startswith("nf4")
        try:
            found = function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # a peer may raise anything; the run goes on without it
            if ours:
                raise
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            continue
        wrong = _wrong(found, case)
        if wrong and ours:
            raise MismatchError(f"{name}: {wrong}; not timed")
        if wrong:
            absent[name] = wrong
        else:
            good[name] = function
    return good, absent


def _wrong(found: Any, case: Case) -> str | None:
    """Return why a result is not the case's; None if it is, or nothing is known of it."""
    if case.expected is None or not isinstance(found, torch.Tensor):
        return None
    if not found.is_floating_point():  # a copy of bytes
        return None
    rows = found.detach()[: len(case.expected)]
    if rows.shape != case.expected.shape:
        return f"expected a result {tuple(case.expected.shape)}, got {tuple(rows.shape)}"
    error = relative_error(rows, case.expected)
    if not error <= PEER_ERROR:
        return f"expected a relative error of at most {PEER_ERROR}, got {error:.3g}"
    return None


@contextmanager
def _on(device: torch.device, threads: int | None) -> Iterator[None]:
    """Make a device the current one, or set the threads of the CPU, while the block runs."""
    before = torch.get_num_threads()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Draw the same values in every run, and leave the caller's state of randomness alone."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
