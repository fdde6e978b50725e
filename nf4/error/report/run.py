"""`nf4 error` from end to end: measure, score, and write the report's folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from nf4.codebook import BLOCK_SIZES
from nf4.error.codebooks import CODEBOOKS
from nf4.error.report.measure import ErrorReport, as_json, measure, perplexities
from nf4.error.report.tables import as_csv
from nf4.error.schemes import Scheme
from nf4.tools.install import from_checkout
from nf4.tools.paths import check_new, new_folder
from nf4.tools.progress import Progress
from nf4.tools.samples import load_model, text_windows, wikipedia_windows
from nf4.tools.sources import WINDOW, check_text

CALIBRATION_WINDOWS = 8  # of the text, after those that are scored


def scored_schemes() -> list[Scheme]:
    """Return the schemes that a model's perplexity is measured under."""
    found = [
        Scheme(),
        Scheme(double_quant=True),
        Scheme(scale="mse"),
        Scheme(double_quant=True, scale="mse"),
    ]
    found += [Scheme(block_size=b) for b in BLOCK_SIZES if b != 64]
    return found + [Scheme(codebook) for codebook in CODEBOOKS if codebook != "nf4"]


def run_error(
    source: str | Path,
    skip_modules: str | Iterable[str],
    scheme: Scheme,
    text: str | None,
    tokens: int,
    out: str | Path | None,
    progress: Progress,
) -> ErrorReport:
    """Measure a model, and write what was asked for.

    Args:
        source: see `nf4.files.dense.dense_weights_in`.
        skip_modules: names of modules to leave out.
        scheme: how to quantize.
        text: a UTF-8 file, or "wikipedia" for articles that the package gensim carries, to measure
            perplexity on, the model a causal one; None leaves that out.
        tokens: of the text to score, in whole windows of 512; the next eight windows serve for
            scales weighted by activations.
        out: folder to make, for ``report.html``, ``report.json``, ``layers.csv`` and the pictures;
            None for none. It appears when all is measured; other schemes are compared for it.
        progress: makes progress bars.

    Raises:
        FileExistsError: out exists.
        FileNotFoundError: source or text is not there.
        ImportError: a package is missing: matplotlib for pictures, transformers for perplexity.
        ValueError: source, text or tokens cannot be used.
    """
    if out is not None:
        out = check_new(out, "out")
        _import_matplotlib()
    if tokens < WINDOW:
        raise ValueError(f"tokens: expected at least {WINDOW}, got {tokens}")
    model, windows, calibration = None, None, None
    if text is not None:
        with progress("Load the model", 1) as bar:
            model, windows, calibration = _load(source, text, tokens // WINDOW)
            bar.step()
    report = measure(source, skip_modules, scheme, progress, compare=out is not None)
    if windows is not None:
        perplexities(report, model, windows, calibration, scored_schemes(), skip_modules, progress)
    if out is not None:
        with new_folder(Path(out)) as folder:
            _write(report, folder)
    return report


def _load(source: str | Path, text: str, count: int) -> tuple[Any, Tensor, Tensor | None]:
    """Return the model, windows to score, and others to collect activations on, if any are left."""
    if text != "wikipedia":
        check_text(text, "perplexity", "a UTF-8 text file, or wikipedia;")
    model, tokenizer = load_model(str(source))
    if text == "wikipedia":
        found = wikipedia_windows(tokenizer, count + CALIBRATION_WINDOWS)
    else:
        found = text_windows(tokenizer, text, count + CALIBRATION_WINDOWS)
    if not len(found):
        raise ValueError(f"perplexity: expected at least {WINDOW} tokens of {text}, got fewer")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < WINDOW:
        raise ValueError(
            f"model: expected one of at least {WINDOW} positions to score, got {positions}"
        )
    rest = found[count:]
    return model, found[:count], rest if len(rest) else None


def _import_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"out: expected matplotlib for the pictures, found none: {from_checkout('demo')}"
        ) from error


def _write(report: ErrorReport, folder: Path) -> None:
    from nf4.error.report.page import page
    from nf4.error.report.plots import pictures

    drawn = pictures(report)
    for name, picture in drawn.items():
        picture.savefig(folder / f"{name}.png", dpi=120)
    (folder / "report.html").write_text(page(report, drawn), encoding="utf-8")
    text = json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    (folder / "layers.csv").write_text(as_csv(report), encoding="utf-8")
