"""One method of the comparison, in a process of its own, which alone makes its memory known.

``python -m nf4.commands.comparison.one`` reads a `Request` as JSON from standard input. It writes
JSON to standard output, a line a message: ``{"bar": [title, steps]}``, ``{"step": remark}``, and
last ``{"found": …}``, a `Found`, or ``{"failed": reason}``. All else goes to standard error.
"""

import copy
import gc
import hashlib
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nf4
from nf4.bench.harness.circumstances import circumstances
from nf4.bench.harness.footprint import cpu_peak, gpu_peak
from nf4.commands.comparison.methods import DTYPES, METHODS, Method, Objective
from nf4.commands.demo.run import model_bytes
from nf4.error.measured import perplexity
from nf4.tools import samples
from nf4.tools.progress import Bar, Progress, steps
from nf4.tools.training import batches, train, trainable

RELOADED_TOKENS = 64


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        method: name of `METHODS`.
        model: as `nf4.tools.samples.load_model` takes it.
        text: as `nf4.tools.samples.training_tokens` takes it.
        steps: of training, at least 2.
        r: rank of the adapters.
        dtype: name of `DTYPES`.
        seed: of the batches, of the adapter, and of what is drawn in training.
        lr: peak learning rate; None if nothing is trained.
        device: where to train.
        threads: of a CPU; None for PyTorch's number.
        adapter: folder to make for the adapter.
    """

    method: str
    model: str | None
    text: str | None
    steps: int
    r: int
    dtype: str
    seed: int
    lr: float | None
    device: str
    threads: int | None
    adapter: str


@dataclass
class Found:
    """What was measured of a method; None for what there is not without training.

    Attributes:
        around: circumstances, see `nf4.bench.harness.circumstances`.
        batches: SHA-256 of the tokens trained on, in their order, as hexadecimal digits.
        held_out_tokens: on which perplexity is measured.
        lr: peak learning rate.
        trainable: elements of the parameters that train.
        model_bytes: of the model's parameters before the adapter.
        peak_bytes: of parameters and adapter, and the most that training steps held beyond.
        peak_missing: why there is no peak_bytes.
        step_seconds: median, p20 and p80, of the steps after the first.
        losses: cross-entropy of each step, in nats per token.
        consistency: AdaMix's other loss of each step, in nats per token.
        perplexity_before: on the held-out text, without the adapter.
        perplexity_after: on the same, with what was trained.
        adapter_bytes: of the adapter's folder.
        reloaded_logits_equal: whether the saved adapter on a fresh model gives the same bits.
    """

    around: dict[str, Any]
    batches: str
    held_out_tokens: int
    lr: float | None
    trainable: int = 0
    model_bytes: int = 0
    peak_bytes: int | None = None
    peak_missing: str | None = "nothing is trained"
    step_seconds: dict[str, float] | None = None
    losses: list[float] = field(default_factory=list)
    consistency: list[float] = field(default_factory=list)
    perplexity_before: float = 0.0
    perplexity_after: float = 0.0
    adapter_bytes: int | None = None
    reloaded_logits_equal: bool | None = None


def measure(request: Request, progress: Progress) -> Found:
    """Load a model, fine-tune it by one method, and measure what that took and gave.

    Args:
        request: what to measure, its options checked.
        progress: makes progress bars.

    Raises:
        FileNotFoundError: model or text is not there.
        ValueError: model or text cannot be used.
    """
    method = METHODS[request.method]
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    device = torch.device(request.device)
    around = circumstances(device)
    with progress(f"{method.label}: load the model", 1) as bar:
        model, tokenizer = samples.load_model(request.model)
        tokens, held_out = samples.training_tokens(tokenizer, request.text)
        model.to(DTYPES[request.dtype])
        if method.quantized:
            nf4.quantize_model(model)
        bar.step()
    data = batches(tokens, request.steps, request.seed)
    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    found = Found(around, digest, held_out.numel(), request.lr, model_bytes=model_bytes(model))
    fresh = copy.deepcopy(model)
    objective = Objective(model.to(device), DTYPES[request.dtype], method.two_draws)
    held_out = held_out.to(device)

    def score(when: str) -> float:
        title = f"{method.label}: perplexity {when}"
        with steps(progress, title, len(held_out)) as step:
            return perplexity(objective, held_out, lambda done, total: step())

    found.perplexity_before = found.perplexity_after = score("before")
    if method.add is None:
        return found
    torch.manual_seed(request.seed)
    method.add(model, request.r)
    _train(objective, data.to(device), method, request, found, progress)
    if method.finish is not None:
        method.finish(model)
    found.perplexity_after = score("after")
    del model
    _save_and_reload(objective, fresh, Path(request.adapter), held_out[:1], found)
    return found


def _train(
    objective: Objective,
    data: Tensor,
    method: Method,
    request: Request,
    found: Found,
    progress: Progress,
) -> None:
    """Train, and put what it took into found."""
    found.trainable = sum(p.numel() for p in trainable(objective))
    _warm_up(objective, data[0])
    torch.manual_seed(request.seed)
    seconds: list[float] = []

    def run() -> None:
        with progress(f"{method.label}: fine-tune", len(data)) as bar:
            last = time.perf_counter()

            def step(loss: float, speed: float) -> None:
                nonlocal last
                seconds.append(time.perf_counter() - last)
                bar.step(f"loss {loss:.3f}, {speed:.0f} tokens/s")
                last = time.perf_counter()

            assert request.lr is not None
            train(objective, data, request.lr, step)

    extra = peak_of(run, data.device)
    if extra is None:
        found.peak_missing = "this system keeps no mark of the most memory that a process held"
    else:
        found.peak_bytes, found.peak_missing = model_bytes(objective) + extra, None
    found.step_seconds = _spread(seconds[1:])
    found.losses = [loss.item() for loss in objective.losses]
    found.consistency = [loss.item() for loss in objective.consistency]


def _warm_up(objective: Objective, batch: Tensor) -> None:
    """Go forward and backward once: what libraries keep after their first use is not counted."""
    objective.train()
    objective(batch, labels=batch).loss.backward()
    objective.zero_grad()
    objective.losses.clear()
    objective.consistency.clear()


def peak_of(function: Callable[[], None], device: torch.device) -> int | None:
    """Call a function, and return the most bytes that it held beyond those held before it.

    Returns:
        Of PyTorch's allocator on a GPU, of the process's resident memory on a CPU; None if the
        system does not tell.
    """
    if device.type == "cuda":
        peak: int = gpu_peak(function, device)
        return peak
    outcome: list[Exception | None] = []

    def call() -> None:
        try:
            function()
            outcome.append(None)
        except Exception as error:  # cpu_peak takes some kinds for its own
            outcome.append(error)

    most: int | None = cpu_peak(call) if sys.platform == "linux" else None
    if not outcome:
        call()
    if outcome[0] is not None:
        raise outcome[0]
    return most


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    p20, p80 = ordered[math.floor(0.2 * last)], ordered[math.ceil(0.8 * last)]
    return {"median": statistics.median(ordered), "p20": p20, "p80": p80}


@torch.no_grad()
def _save_and_reload(
    objective: Objective, fresh: nn.Module, adapter: Path, window: Tensor, found: Found
) -> None:
    """Save the adapter, and hold the model against a fresh one with that adapter.

    The trained model is let go before the fresh one goes to its device, to hold one at a time.
    """
    nf4.save_adapter(objective.model, adapter)
    found.adapter_bytes = sum(f.stat().st_size for f in adapter.rglob("*") if f.is_file())
    tokens = window[:, :RELOADED_TOKENS]
    objective.eval()
    logits = objective(tokens).logits
    objective.model = fresh
    gc.collect()
    fresh.to(window.device)
    nf4.load_adapter(fresh, adapter)
    objective.eval()
    found.reloaded_logits_equal = torch.equal(objective(tokens).logits, logits)


class _Told:
    """A progress bar that another process shows."""

    def __init__(self, tell: Callable[[str, Any], None]) -> None:
        self._tell = tell

    def step(self, remark: str = "") -> None:
        """Move on by one."""
        self._tell("step", remark)


def main() -> int:
    """Measure what standard input asks for, and return 0, or 1 if that failed."""
    # What packages print must not come between the messages
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(kind: str, content: Any) -> None:
        pipe.write(json.dumps({kind: content}) + "\n")
        pipe.flush()

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Bar]:
        tell("bar", [title, total])
        yield _Told(tell)

    try:
        found = measure(Request(**json.load(sys.stdin)), progress)
    except Exception as error:  # whatever a method's packages raise is its answer
        traceback.print_exc()
        reason = " ".join(str(error).split())
        tell("failed", f"{type(error).__name__}: {reason}")
        return 1
    tell("found", asdict(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
