"""SmolLM2-135M on a CPU from end to end: nf4 and bitsandbytes + PEFT, in one process, in turns.

Quantize the model, score windows of Wikipedia, take a QLoRA training step, and decode; each is
timed by the clock and in CPU time, after both results were held against each other.

python bench/model/smollm2.py --rounds 5 --windows 4 --out found.json
"""

import argparse
import copy
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nf4.bench.harness.circumstances import circumstances
from nf4.bench.harness.markdown import heading, table
from nf4.bench.model import contenders
from nf4.error.measured import perplexity
from nf4.models.quantize import quantized_layers
from nf4.tools import samples
from nf4.tools.paths import write_file
from nf4.tools.progress import Progress, progress_bar, steps

FORMAT = "nf4-smollm2-1"
NAMES = ("nf4", "bitsandbytes")
R, LORA_ALPHA = 8, 16
PROMPT, LENGTH, NEW_TOKENS = 32, 256, 64
WARM_UP = 1  # rounds that are not counted: bitsandbytes lays weights out anew, numba compiles
# Nats per token. Where a processor has AVX512-BF16, bitsandbytes computes outside training in
# bf16, from scales in bf16: token by token 0.03 off in the root mean square on SmolLM2, at random,
# so that the mean of a window is off by 0.03 / sqrt(511) = 0.0013. Quantization itself costs 0.25.
TOLERANCE = 0.01
TASKS = {
    "quantize": "quantize {layers} linear layers",
    "perplexity": "perplexity of {tokens} tokens",
    "train": "QLoRA training step, 1×{length} tokens, r = {r}",
    "generate": "generate {new_tokens} tokens, batch 1",
}

Task = tuple[Callable[[], Any], Callable[[Any], Any]]


@dataclass(frozen=True)
class Sample:
    """What is run.

    Attributes:
        name: of the model.
        model: dense, in fp32.
        windows: int64 ``[windows, T]``, of at least 256 tokens each.
    """

    name: str
    model: nn.Module
    windows: Tensor


@dataclass(frozen=True)
class Seconds:
    """What one task took: by the clock, and of all threads together, user and system."""

    best: float
    median: float
    cpu_best: float
    cpu_median: float

    @classmethod
    def of(cls, wall: list[float], cpu: list[float]) -> "Seconds":
        """Return the best and the median of rounds."""
        return cls(min(wall), statistics.median(wall), min(cpu), statistics.median(cpu))


def packaged(windows: int) -> Sample:
    """Return SmolLM2-135M and the beginnings of Wikipedia articles, both from packages."""
    model, tokenizer = samples.load_model(None)
    return Sample("SmolLM2-135M", model, samples.wikipedia_windows(tokenizer, windows))


class Contender:
    """One side of the comparison: a model to infer with, and another with adapters to train.

    They are two because bitsandbytes lays the weights of a model in evaluation mode out anew, after
    which it cannot be trained.

    Args:
        name: of the contender.
        sample: what is run; its model is left unchanged.
        dtype: in which products are computed.
    """

    def __init__(self, name: str, sample: Sample, dtype: torch.dtype) -> None:
        self.name, self.sample, self.dtype = name, sample, dtype
        self.model = self.quantize(self.copy()).eval()
        torch.manual_seed(0)
        self.adapted = contenders.adapt(name, self.quantize(self.copy()), R, LORA_ALPHA)
        # A learning rate of 0: every step does the same
        self.optimizer = contenders.optimizer_of(self.adapted, 0.0)

    def copy(self) -> nn.Module:
        """Return a copy of the dense model."""
        return copy.deepcopy(self.sample.model)

    def quantize(self, model: nn.Module) -> nn.Module:
        """Quantize a dense model in place and return it."""
        return contenders.quantize(self.name, model, self.dtype)

    def perplexity(self) -> float:
        """Return the perplexity on the windows."""
        return perplexity(self.model, self.sample.windows)

    def train(self) -> None:
        """Take a training step."""
        batch = self.sample.windows[:1, :LENGTH]
        contenders.train_step(self.adapted, batch, self.optimizer, self.dtype)

    def generate(self) -> list[int]:
        """Return the tokens that the model makes of the first window's beginning."""
        prompt = self.sample.windows[:1, :PROMPT]
        return contenders.generate(self.model, prompt, NEW_TOKENS, [])[0, PROMPT:].tolist()

    def tasks(self) -> dict[str, Task]:
        """Return what to time by name: what makes ready, and what takes what that returns."""
        return {
            "quantize": (self.copy, self.quantize),
            "perplexity": (lambda: None, lambda _: self.perplexity()),
            "train": (lambda: None, lambda _: self.train()),
            "generate": (lambda: None, lambda _: self.generate()),
        }


def packed_codes(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the packed bytes of each quantized layer, flat."""
    if name == "nf4":
        return {n: layer.weight.packed.flatten() for n, layer in quantized_layers(model).items()}
    from bitsandbytes.nn import Linear4bit

    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    return {n: layer.weight.data.flatten() for n, layer in layers.items()}


def check(field: dict[str, Contender]) -> dict[str, Any]:
    """Hold both against each other: the codes, perplexity, first loss, and gradients.

    Returns:
        Perplexities, losses, layers, and how many tokens both generate alike before they part.

    Raises:
        ValueError: the results differ; what is wrong is not timed.
    """
    ours, theirs = (packed_codes(name, field[name].model) for name in NAMES)
    if ours.keys() != theirs.keys():
        raise ValueError(f"layers: expected {len(theirs)} alike, got {len(ours)}; not timed")
    for name, codes in ours.items():
        if not torch.equal(codes, theirs[name]):
            raise ValueError(f"{name}: expected bitsandbytes' codes, got others; not timed")
    perplexities, losses, tokens = {}, {}, []
    for name, contender in field.items():
        batch = contender.sample.windows[:1, :LENGTH]
        losses[name] = contenders.backward(contender.adapted, batch, contender.dtype).loss.item()
        contenders.check_gradients(contender.adapted)
        contender.optimizer.zero_grad()
        perplexities[name] = contender.perplexity()
        tokens.append(contender.generate())
    apart = {
        "perplexity": abs(math.log(perplexities["nf4"] / perplexities["bitsandbytes"])),
        "loss": abs(losses["nf4"] - losses["bitsandbytes"]),
    }
    for what, difference in apart.items():
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{what}: expected within {TOLERANCE} nats of bitsandbytes', got "
                f"{difference:.3g} apart; not timed"
            )
    alike = [a == b for a, b in zip(*tokens, strict=True)]
    return {
        "layers": len(ours),
        "perplexity": perplexities,
        "loss": losses,
        "tokens_alike": [*alike, False].index(False),
    }


def race(
    field: dict[str, Contender], rounds: int, step: Callable[[], None]
) -> dict[str, dict[str, Seconds]]:
    """Time every task of both in turn, round by round.

    Args:
        field: the contenders.
        rounds: that are counted.
        step: called after each task of each round.

    Returns:
        `Seconds` by task and contender.
    """
    tasks = {name: contender.tasks() for name, contender in field.items()}
    found = {}
    for task in TASKS:
        wall: dict[str, list[float]] = {name: [] for name in field}
        cpu: dict[str, list[float]] = {name: [] for name in field}
        for turn in range(WARM_UP + rounds):
            for name in list(field)[:: -1 if turn % 2 else 1]:
                seconds = _seconds(*tasks[name][task])
                wall[name].append(seconds[0])
                cpu[name].append(seconds[1])
            step()
        found[task] = {n: Seconds.of(wall[n][WARM_UP:], cpu[n][WARM_UP:]) for n in field}
    return found


def _seconds(ready: Callable[[], Any], run: Callable[[Any], Any]) -> tuple[float, float]:
    """Return the seconds that run took, by the clock and in CPU time."""
    argument = ready()
    gc.collect()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    run(argument)
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def measure(
    rounds: int = 5,
    windows: int = 4,
    dtype: str = "fp32",
    load: Callable[[int], Sample] = packaged,
    progress: Progress = progress_bar,
) -> dict[str, Any]:
    """Check both and time them.

    Args:
        rounds: that are counted, at least 1.
        windows: of text to score, at least 1.
        dtype: name of `contenders.DTYPES`: of the dense weights, and of products.
        load: returns what to run for a number of windows.
        progress: shows how far it is.

    Returns:
        What goes to a file, and to `tables`.

    Raises:
        ModuleNotFoundError: bitsandbytes or PEFT is not installed.
        ValueError: an argument is out of range, or the results of both differ.
    """
    for name, value in (("rounds", rounds), ("windows", windows)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    absent = contenders.missing("bitsandbytes")
    if absent is not None:
        raise ModuleNotFoundError(f"expected bitsandbytes and peft to compare with, {absent}")
    sample = load(windows)
    sample.model.to(contenders.DTYPES[dtype])
    field = {name: Contender(name, sample, contenders.DTYPES[dtype]) for name in NAMES}
    facts = check(field)
    with steps(progress, "nf4, bitsandbytes + PEFT", len(TASKS) * (WARM_UP + rounds)) as step:
        results = race(field, rounds, step)
    return {
        "format": FORMAT,
        **circumstances(torch.device("cpu")),
        "model": sample.name,
        "dtype": dtype,
        "rounds": rounds,
        "tokens": sample.windows.numel(),
        "length": LENGTH,
        "r": R,
        "new_tokens": NEW_TOKENS,
        **facts,
        "results": {t: {n: asdict(s) for n, s in row.items()} for t, row in results.items()},
    }


def tables(data: dict[str, Any]) -> str:
    """Return what `measure` found as Markdown."""
    perplexities = ", ".join(f"{data['perplexity'][n]:.3f} ({n})" for n in NAMES)
    losses = ", ".join(f"{data['loss'][n]:.4f} ({n})" for n in NAMES)
    lines = heading(f"{data['model']} on a CPU, {data['dtype']}", data)
    lines += [
        f"Seconds: best of {data['rounds']} and, in brackets, their median; CPU seconds are of all "
        f"threads, best. Perplexity {perplexities}; loss of the training step {losses}; the first "
        f"{data['tokens_alike']} generated tokens are alike.",
        "",
    ]
    columns = ["", "nf4", "bitsandbytes + PEFT", "theirs / ours"]
    columns += ["nf4, CPU s", "bitsandbytes + PEFT, CPU s", "theirs / ours"]
    return "\n".join([*lines, *table(columns, rows(data))])


def rows(data: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a line a task: its name, ours, theirs, the ratio, and the same of CPU time."""
    for task, label in TASKS.items():
        ours, theirs = (data["results"][task][name] for name in NAMES)
        yield [
            label.format(**data),
            *(f"{s['best']:.3f} ({s['median']:.3f})" for s in (ours, theirs)),
            f"{theirs['best'] / ours['best']:.2f}",
            *(f"{s['cpu_best']:.3f}" for s in (ours, theirs)),
            f"{theirs['cpu_best'] / ours['cpu_best']:.2f}",
        ]


def main(load: Callable[[int], Sample] = packaged) -> None:
    """Read the options, measure, print, and write the file that was asked for.

    Args:
        load: as for `measure`.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=contenders.positive, default=5)
    parser.add_argument(
        "--windows", type=contenders.positive, default=4, help="of 512 tokens, to score"
    )
    parser.add_argument("--dtype", choices=contenders.DTYPES, default="fp32")
    parser.add_argument("--threads", type=contenders.positive, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        data = measure(options.rounds, options.windows, options.dtype, load)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        parser.error(str(error))
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    if options.out is not None:
        write_file(options.out, text)
    sys.stdout.write(text if options.json else tables(data))


if __name__ == "__main__":
    main()
