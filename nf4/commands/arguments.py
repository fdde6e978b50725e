"""Check what a command is given before torch is imported: a mistake is told at once.

What computes checks its arguments itself, whoever calls it; these are the same functions where
there is one, and the same words.
"""

import argparse
import re
from pathlib import Path

from nf4.codebook import check_block_size, check_scale
from nf4.files.formats import check_dtype, check_format
from nf4.tools.paths import check_adapter_folder, check_model_folder, check_new
from nf4.tools.sources import WINDOW, check_packages, check_text, model_path


def check_demo(options: argparse.Namespace) -> None:
    """Raise unless `nf4 demo` can begin."""
    check_least("steps", options.steps, 1)
    if options.out is not None:
        check_new(options.out, "out")
    check_packages(options.model)
    model_path("smollm2" if options.model is None else options.model)
    if options.text is not None:
        check_text(options.text)


def check_quantize(options: argparse.Namespace) -> None:
    """Raise unless `nf4 quantize` can begin."""
    check_block_size(options.block_size)
    check_scale(options.scale)
    if options.dry_run:
        check_model_folder(options.source, "source_dir")
        return
    if options.target is None:
        raise ValueError("target: expected a folder to make, got none; or --dry-run")
    _check_folders(options)


def check_export(options: argparse.Namespace) -> None:
    """Raise unless `nf4 export` can begin."""
    check_format(options.format)
    _check_folders(options)


def check_merge(options: argparse.Namespace) -> None:
    """Raise unless `nf4 merge` can begin."""
    if options.dtype is not None:
        check_dtype(options.dtype)
    check_new(options.target, "target_dir")
    check_model_folder(options.base, "base")
    check_adapter_folder(options.adapter, "adapter")
    if options.original is not None:
        check_model_folder(options.original, "original")


def check_error(options: argparse.Namespace) -> None:
    """Raise unless `nf4 error` can begin."""
    if (options.model is None) != options.codebooks:
        raise ValueError("model: expected a model or --codebooks, one of them")
    if options.codebooks:
        if options.csv or options.out is not None:
            raise ValueError("codebooks: expected --json or neither, got --csv or --out")
        return
    if options.out is not None:
        check_new(options.out, "out")
    check_block_size(options.block_size)
    check_scale(options.scale)
    check_least("tokens", options.tokens, WINDOW)
    model_path(options.model)
    if options.perplexity not in (None, "wikipedia"):
        check_text(options.perplexity, "perplexity", "a UTF-8 text file, or wikipedia;")


def check_verify(options: argparse.Namespace) -> None:
    """Raise unless `nf4 verify` can begin; only torch knows what devices there are."""
    if options.seed < 0:
        raise ValueError(f"seed: expected an int of at least 0, got {options.seed}")
    if options.device is not None and not re.fullmatch(r"[a-z]+(:\d+)?", options.device):
        raise ValueError(f"device: expected one that is here, got {options.device}")


def check_least(name: str, value: int, least: int) -> None:
    """Raise ValueError if a number is too small."""
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_json_file(path: str | Path) -> None:
    """Raise ValueError if there is no file at a path that is to be read as JSON."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a JSON file, got none: there is no file at this path")


def _check_folders(options: argparse.Namespace) -> None:
    check_new(options.target, "target_dir")
    check_model_folder(options.source, "source_dir")
