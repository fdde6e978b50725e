"""`nf4 compare` from end to end: each method in its process, then files, tables and a picture."""

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from nf4.commands.comparison.methods import METHODS
from nf4.commands.comparison.one import Request
from nf4.commands.comparison.options import Options, check_results
from nf4.commands.comparison.plots import draw
from nf4.commands.comparison.report import FORMAT, tables
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
        ValueError: there is no such device.
        MethodsFailedError: no method came through; nothing is written then.
    """
    out = check_new(out, "out")
    check_results(results)
    _check_device(options.device)
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with new_folder(out) as folder:
        (folder / "adapters").mkdir()
        for name in options.methods:
            request = _request(options, name, folder / "adapters" / name)
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


def _request(options: Options, method: str, adapter: Path) -> Request:
    """Return what the process of one method is asked for."""
    shared = {name: getattr(options, name) for name in ("model", "text", "steps", "r", "dtype")}
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Request(
        method,
        **shared,
        seed=options.seed,
        lr=options.lr.get(method, METHODS[method].lr),
        device=device,
        threads=options.threads,
        adapter=str(adapter),
    )


def _check_device(device: str | None) -> None:
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that this machine has, got {device!r}")
