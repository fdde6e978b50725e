"""`nf4 compare` from end to end: each method in its process, then files, tables and a picture."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from nf4.commands.comparison.methods import DTYPES, METHODS
from nf4.commands.comparison.one import Request
from nf4.commands.comparison.plots import draw
from nf4.commands.comparison.report import FORMAT, tables
from nf4.tools import samples
from nf4.tools.paths import check_new, new_folder, write_file
from nf4.tools.progress import Bar, Progress
from nf4.tools.training import BATCH, LENGTH

SHAKESPEARE = "Othello (1623), Macbeth held out"


class MethodsFailedError(RuntimeError):
    """No method came through.

    Attributes:
        failed: reasons by method.
    """

    def __init__(self, failed: dict[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        self.failed = failed


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        model: as `nf4.tools.samples.load_model` takes it.
        methods: names of `METHODS`, in the order in which to run them.
        steps: of training, at least 2: the first is not timed.
        text: a UTF-8 file, whose last tenth is held out; None for Shakespeare.
        r: rank of the adapters.
        dtype: name of `DTYPES`: of what stays dense, and of products.
        seed: of all randomness.
        lr: peak learning rates by method; the methods' own where there is none.
        device: where to train; a GPU if there is one by default.
        threads: of a CPU; PyTorch's number by default.

    Raises:
        FileNotFoundError: model or text is not there.
        ModuleNotFoundError: a package of nf4[demo] is missing.
        ValueError: an option is out of range.
    """

    model: str | None = None
    methods: Sequence[str] = tuple(METHODS)
    steps: int = 40
    text: str | None = None
    r: int = 8
    dtype: str = "float32"
    seed: int = 0
    lr: Mapping[str, float] = field(default_factory=dict)
    device: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check every option, as far as it can be without loading the model."""
        _check_methods(self.methods, self.lr)
        if self.steps < 2:
            raise ValueError(f"steps: expected at least 2 (one is not timed), got {self.steps}")
        for name, value in (("r", self.r), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        _check_device(self.device)
        samples.check_packages(self.model)
        if self.model is not None:
            samples.model_path(self.model)
        if self.text is not None and not Path(self.text).is_file():
            raise FileNotFoundError(f"text: expected a UTF-8 text file, {self.text} does not exist")

    def request(self, method: str, adapter: Path) -> Request:
        """Return what the process of one method is asked for."""
        shared = {name: getattr(self, name) for name in ("model", "text", "steps", "r", "dtype")}
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return Request(
            method,
            **shared,
            seed=self.seed,
            lr=self.lr.get(method, METHODS[method].lr),
            device=device,
            threads=self.threads,
            adapter=str(adapter),
        )


def run_compare(
    options: Options, out: str | Path, results: str | Path | None, progress: Progress
) -> dict[str, Any]:
    """Fine-tune a model by each method, one after the other, and write what was found.

    Args:
        options: what to compare.
        out: folder to make, for ``compare.json``, ``compare.png``, ``table.md`` and the adapters;
            it appears when all is done.
        results: another file for the JSON; None for none.
        progress: makes progress bars.

    Returns:
        What ``compare.json`` holds: options, circumstances, ``methods``, and ``failed``, the reason
        for each method that did not come through.

    Raises:
        FileExistsError: out exists.
        IsADirectoryError: results is a folder.
        MethodsFailedError: no method came through; nothing is written then.
    """
    out = check_new(out, "out")
    if results is not None and Path(results).is_dir():
        raise IsADirectoryError(f"results: expected a file, {results} is a folder")
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with new_folder(out) as folder:
        (folder / "adapters").mkdir()
        for name in options.methods:
            request = options.request(name, folder / "adapters" / name)
            answer = run_one(request, progress)
            if "found" in answer:
                found[name] = answer["found"]
            else:
                failed[name] = answer["failed"]
        if not found:
            raise MethodsFailedError(failed)
        data = _together(options, found, failed)
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        (folder / "compare.json").write_text(text, encoding="utf-8")
        (folder / "table.md").write_text(tables(data), encoding="utf-8")
        draw(data, folder / "compare.png")
    if results is not None:
        write_file(Path(results), text)
    return data


def run_one(request: Request, progress: Progress) -> dict[str, Any]:
    """Run a method in a process of its own.

    Returns:
        ``found``, or ``failed``, one line.
    """
    command = [sys.executable, "-m", "nf4.commands.comparison.one"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it ended before it read; why is told below
                process.stdin.write(json.dumps(asdict(request)))
                process.stdin.close()
            answer = _listen(process.stdout, progress)
            process.wait()
        except BaseException:
            process.kill()
            raise
        if not answer:
            errors.seek(0)
            (*_, last) = ["", *errors.read().decode(errors="replace").splitlines()]
            code = f"its process ended with exit status {process.returncode}"
            answer = {"failed": f"{code}: {last.strip()}" if last.strip() else code}
    return answer


def _listen(lines: IO[str], progress: Progress) -> dict[str, Any]:
    """Show the progress that a process tells of, and return its answer, empty if there is none."""
    answer: dict[str, Any] = {}
    with ExitStack() as stack:
        bar: Bar | None = None
        for line in lines:
            message = json.loads(line)
            if "bar" in message:
                stack.close()
                bar = stack.enter_context(progress(*message["bar"]))
            elif "step" not in message:
                answer = message
            elif bar is not None:
                bar.step(message["step"])
    return answer


def _together(
    options: Options, found: dict[str, dict[str, Any]], failed: dict[str, str]
) -> dict[str, Any]:
    """Return what goes to the file."""
    first = next(iter(found.values()))
    own = {name: {k: v for k, v in f.items() if k != "around"} for name, f in found.items()}
    return {
        "format": FORMAT,
        **first["around"],
        "model": Path(options.model).name if options.model else "SmolLM2-135M-Instruct",
        "text": Path(options.text).name if options.text else SHAKESPEARE,
        "steps": options.steps,
        "batch": BATCH,
        "length": LENGTH,
        "held_out_tokens": first["held_out_tokens"],
        "r": options.r,
        "dtype": options.dtype,
        "seed": options.seed,
        "methods": own,
        "failed": failed,
    }


def _check_methods(methods: Iterable[str], lr: Mapping[str, float]) -> None:
    known = ", ".join(METHODS)
    methods = list(methods)
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"methods: expected some of {known}, got {name!r}")
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods: expected some of {known}, each once, got {methods}")
    trained = [name for name in methods if METHODS[name].lr is not None]
    for name, value in lr.items():
        if name not in trained:
            raise ValueError(f"lr: expected a method that is trained here, got {name!r}")
        if not 0 < value < math.inf:
            raise ValueError(f"lr: expected a positive number for {name}, got {value}")


def _check_device(device: str | None) -> None:
    if device is None:
        return
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device: expected cuda, cuda:1, … or cpu, got {device!r}") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected one that this machine has, got {device!r}")
