"""Training steps and decoding of a Llama-shaped model: nf4, bitsandbytes + PEFT, dense + PEFT.

Tokens per second and peak memory of a training step (forward, backward, AdamW on the adapters, in
autocast to 16 bits), and tokens per second of greedy decoding after a prompt of 32 tokens, whose
own pass is not counted. Each contender runs in a process of its own, from the same random weights;
if all fit in memory together they take turns, round by round, otherwise they run one after another.

python bench/model/end_to_end.py --size auto --out found.json
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nf4.bench.harness.circumstances import circumstances
from nf4.bench.harness.markdown import heading, table
from nf4.bench.model import contenders
from nf4.bench.model.end_to_end_run import PROMPT, Check, Child, ContenderError
from nf4.bench.model.llama import SIZES, Options, free_bytes, largest_size, needed_bytes
from nf4.tools.paths import write_file
from nf4.tools.progress import Progress, progress_bar, steps

FORMAT = "nf4-end-to-end-1"
BATCHES = (1, 8, 32)  # of decoding
WARM_UP = 2  # rounds that are not counted
SETTLE = 0.05  # seconds before a turn: OpenMP's threads of the one before spin for a while


@dataclass(frozen=True)
class Rate:
    """Tokens per second."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, tokens: int, seconds: list[float]) -> "Rate":
        """Return the rates at which tokens came in the median and in a fifth from either end."""
        rates = sorted(tokens / s for s in seconds)
        p20, p80 = (rates[int(share * (len(rates) - 1))] for share in (0.2, 0.8))
        return cls(statistics.median(rates), p20, p80)


@dataclass(frozen=True)
class Result:
    """What was measured of a contender.

    Attributes:
        first_loss: nats per token.
        trained: elements of the adapters.
        step: of training.
        peak: most bytes held in training, without what the process held before there was a model;
            None where the system does not tell.
        decode: by batch.
    """

    first_loss: float
    trained: int
    step: Rate
    peak: int | None
    decode: dict[str, Rate]


def tolerance(spread: float, options: Options) -> float:
    """Return how far token losses of two implementations of one 4-bit model may be apart.

    The gradient of a token's loss in its logits has a norm of about 1, so that logits of relative
    error e and a spread of s about their mean move it by s e in the root mean square. A layer adds
    to e about a unit roundoff u: its roundings are about 0.4 u each, twice for two implementations,
    and not all of the stream's size; independent, they add up as a square root. bitsandbytes takes
    another 8-bit scale than the nearest for about one block of 800, by some 0.6 %, which is 2**-12
    of the weights' norm. Four times what that gives: of models of 30 and 160 million weights a
    fifth of it was found, and seven times as much with blocks of 128 in ours.

    Args:
        spread: of the logits, as in `Check`.
        options: what is timed.

    Returns:
        Nats, to hold the root mean square of differences to.
    """
    unit = torch.finfo(contenders.DTYPES[options.dtype]).eps / 2
    return 4 * spread * (unit + 2**-12) * math.sqrt(SIZES[options.size][2])


def compare(checks: dict[str, Check], options: Options) -> dict[str, float]:
    """Hold our losses to those of PyTorch on dequantized weights, and to bitsandbytes'.

    Args:
        checks: by contender; nothing is compared without ours.
        options: what is timed.

    Returns:
        The difference in nats, by what ours was compared with.

    Raises:
        ValueError: one is beyond `tolerance`: what is wrong is not timed.
    """
    ours, differences = checks.get("nf4"), {}
    if ours is None or ours.plain is None:
        return {}
    allowed = tolerance(ours.spread, options)
    others = {"dequantized weights": ours.plain}
    if "bitsandbytes" in checks:
        others["bitsandbytes"] = checks["bitsandbytes"].token_losses
    for who, losses in others.items():
        pairs = zip(ours.token_losses, losses, strict=True)
        differences[who] = math.sqrt(statistics.fmean((a - b) ** 2 for a, b in pairs))
    if "bitsandbytes" in checks:
        apart = abs(ours.loss - checks["bitsandbytes"].loss)
        differences["bitsandbytes"] = max(differences["bitsandbytes"], apart)
    for who, difference in differences.items():
        if not difference <= allowed:
            raise ValueError(
                f"nf4: expected losses within {allowed:.3g} nats of those with {who}, got "
                f"{difference:.3g} apart; not timed"
            )
    return differences


def measure(
    options: Options,
    start: Callable[[str, Options], Any] = Child,
    progress: Progress = progress_bar,
) -> dict[str, Any]:
    """Check and time every contender whose packages are installed.

    Args:
        options: what to time.
        start: makes a `Run`, or what answers for one.
        progress: shows how far it is.

    Returns:
        What goes to a file, and to `tables`.

    Raises:
        ValueError: our losses are not those of the others.
        ContenderError: ours failed; others that fail are left out, with the reason.
    """
    left_out = {name: why for name in contenders.LABELS if (why := contenders.missing(name))}
    names = [name for name in contenders.LABELS if name not in left_out]
    together = len(names) * needed_bytes(options) <= free_bytes(torch.device(options.device))
    checks: dict[str, Check] = {}
    results: dict[str, Result] = {}
    differences: dict[str, float] = {}
    for group in [names] if together else [[name] for name in names]:
        field = Field(start, options, left_out)
        try:
            field.enter(group)
            checks |= field.ask("check")
            differences |= compare(checks, options)
            results |= field.race(checks, progress)
        finally:
            field.close()
    return {
        "format": FORMAT,
        **circumstances(torch.device(options.device)),
        "options": asdict(options),
        "together": together,
        "differences": differences,
        "results": {name: asdict(results[name]) for name in contenders.LABELS if name in results},
        "left_out": left_out,
    }


class Field:
    """The contenders that run at a time.

    Args:
        start: makes a `Run`, or what answers for one.
        options: what to time.
        left_out: takes the reason for each that fails.
    """

    def __init__(
        self, start: Callable[[str, Options], Any], options: Options, left_out: dict[str, str]
    ) -> None:
        self.start, self.options, self.left_out = start, options, left_out
        self.runs: dict[str, Any] = {}

    def enter(self, names: Iterable[str]) -> None:
        """Start contenders one after another."""
        for name in names:
            with self._leaving_out(name):
                self.runs[name] = self.start(name, self.options)

    def ask(self, method: str, *args: Any, turn: int = 0) -> dict[str, Any]:
        """Ask each contender in turn, the last one first if turn is odd, and return the answers."""
        answers = {}
        for name in list(self.runs)[:: -1 if turn % 2 else 1]:
            time.sleep(SETTLE)
            with self._leaving_out(name):
                answers[name] = self.runs[name].ask(method, *args)
        return answers

    @contextmanager
    def _leaving_out(self, name: str) -> Iterator[None]:
        try:
            yield
        except ContenderError as error:
            if name == "nf4":
                raise
            self.left_out[name] = str(error)
            if name in self.runs:
                self.runs.pop(name).close()

    def race(self, checks: dict[str, Check], progress: Progress) -> dict[str, Result]:
        """Time training and then decoding, round by round; return what those measured at the end.

        Args:
            checks: of each contender.
            progress: shows how far it is.
        """
        options = self.options
        rounds = WARM_UP + options.rounds
        title = ", ".join(self.runs)
        with steps(progress, title, (1 + len(BATCHES)) * rounds) as step:
            trained = self._rounds(rounds, step, "step")
            peaks = self.ask("peak")
            self.ask("prepare_decoding")
            decoded = {b: self._rounds(rounds, step, "decode", b) for b in BATCHES}
        found = {}
        for name in self.runs:
            decode = {
                str(batch): Rate.of(batch * (options.new_tokens - 1), seconds[name])
                for batch, seconds in decoded.items()
            }
            rate = Rate.of(options.batch * options.length, trained[name])
            check = checks[name]
            found[name] = Result(check.loss, check.trained, rate, peaks[name], decode)
        return found

    def _rounds(
        self, rounds: int, step: Callable[[], None], method: str, *args: Any
    ) -> dict[str, list[float]]:
        """Return the seconds of each round but those that warm up, by contender."""
        found: dict[str, list[float]] = {name: [] for name in self.runs}
        for turn in range(rounds):
            for name, seconds in self.ask(method, *args, turn=turn).items():
                found[name].append(seconds)
            step()
        return {name: seconds[WARM_UP:] for name, seconds in found.items()}

    def close(self) -> None:
        """End what is still running."""
        for run in self.runs.values():
            run.close()


def tables(data: dict[str, Any]) -> str:
    """Return what `measure` found as Markdown."""
    options = data["options"]
    way = "taking turns" if data["together"] else "one after another"
    checkpointing = "with" if options["checkpointing"] else "without"
    differences = ", ".join(f"{d:.2g} ({who})" for who, d in data["differences"].items())
    lines = heading(f"End to end: a Llama of size {options['size']}", data)
    lines += [
        f"Training {options['batch']}×{options['length']} tokens in {options['dtype']}, "
        f"{checkpointing} gradient checkpointing; decoding {options['new_tokens']} tokens after "
        f"{PROMPT}; medians of {options['rounds']}, {way}. Losses differ from ours by "
        f"{differences} nats.",
        "",
    ]
    columns = ["", "training tokens/s", "p20–p80", "ours / theirs", "peak MB"]
    columns += [f"decoding tokens/s, batch {batch}" for batch in BATCHES]
    return "\n".join([*lines, *table([*columns, "first loss"], _rows(data))])


def _rows(data: dict[str, Any]) -> Iterator[list[str]]:
    ours = data["results"]["nf4"]["step"]["median"]
    for name, label in reversed(contenders.LABELS.items()):
        label = label.replace("dense", f"dense {data['options']['dtype']}")
        if name in data["left_out"]:
            yield [label, f"left out: {data['left_out'][name]}", *[""] * (4 + len(BATCHES))]
            continue
        row = data["results"][name]
        rate = row["step"]
        yield [
            label,
            f"{rate['median']:.0f}",
            f"{rate['p20']:.0f}–{rate['p80']:.0f}",
            f"{ours / rate['median']:.2f}",
            "" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}",
            *(f"{row['decode'][str(batch)]['median']:.1f}" for batch in BATCHES),
            f"{row['first_loss']:.4f}",
        ]


def main() -> None:
    """Read the options, measure, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=[*SIZES, "auto"], default="auto")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=contenders.DTYPES, default="bf16")
    parser.add_argument("--rounds", type=contenders.positive, default=20 if gpu else 5)
    parser.add_argument(
        "--batch", type=contenders.positive, default=1, help="sequences of a training step"
    )
    parser.add_argument(
        "--length", type=contenders.positive, default=2048 if gpu else 256, help="in tokens"
    )
    parser.add_argument(
        "--new-tokens", type=contenders.positive, default=128 if gpu else 32, help="to decode"
    )
    parser.add_argument("--checkpointing", action="store_true", help="of gradients")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = vars(parser.parse_args())
    out, as_json = given.pop("out"), given.pop("json")
    try:
        options = Options(**given)
    except ValueError as error:
        parser.error(str(error))
    if options.size == "auto":
        options = replace(options, size=largest_size(replace(options, size="tiny")))
    data = measure(options)
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    if out is not None:
        write_file(out, text)
    sys.stdout.write(text if as_json else tables(data))


if __name__ == "__main__":
    main()
