"""Quantize a checkpoint from folder to folder, a weight at a time: the model is never in memory."""

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from nf4.files.architectures import Plan, architectures
from nf4.files.rewriting import Rewriting, open_source
from nf4.functional import quantize
from nf4.models.quantize import check_callback
from nf4.models.selection import check_skip_modules
from nf4.ops.checks import check_block_size, check_scale
from nf4.tensor import PARTS, mark
from nf4.tools.job import Ranks, check_ranks
from nf4.tools.paths import check_new
from nf4.tools.shards import Shards, read_json


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What `quantize_checkpoint` wrote.

    Attributes:
        layers: how many weights were quantized.
        bytes_before: of all tensors in the source.
        bytes_after: of all tensors written.
    """

    layers: int
    bytes_before: int
    bytes_after: int


def quantize_checkpoint(
    source_dir: str | os.PathLike[str],
    target_dir: str | os.PathLike[str],
    skip_modules: str | Iterable[str] | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    scale: str = "absmax",
    progress: Callable[[int, int], None] | None = None,
    ranks: tuple[int, int] | None = None,
) -> QuantizedCheckpoint:
    """Quantize a transformers folder into another, which ``from_pretrained`` opens.

    The bits are those of ``from_pretrained(source_dir, quantization_config=NF4Config(…))``. A file
    is written for each file of the source; memory holds one weight, and what one file becomes.
    Until all is done the files lie in a hidden folder beside the target: call it again after an
    interruption, and it goes on after the last whole file. Experts of a mixture stay dense, and so
    do embeddings. Tokenizers and other files beside the weights are copied, folders are not. The
    same source gives the same bytes.

    Several processes share the work if all of them call it, as under ``torchrun``: each makes its
    share of the files, about equal in bytes, on a file system that they share. Rank 0 alone reports
    progress, writes what is beside the weights, and gives the folder its name when all are done.
    The bytes are those of one process; after an interruption any number of processes goes on. If
    one fails, all raise its error, which begins with its rank in the others.

    Args:
        source_dir: folder with ``config.json`` and safetensors.
        target_dir: folder to make.
        skip_modules: names of modules to leave dense, as for `nf4.quantize_model`; by default what
            transformers leaves alone, such as the output layer, to which names that begin with a
            plus are added.
        block_size: elements that share one scale, a power of two from 32 to 4096.
        double_quant: quantize the scales to 8 bits too.
        scale: how scales are found, see `nf4.quantize`.
        progress: called with (files done, files in all), in rank 0 only.
        ranks: (rank of this process, number of processes) that share the work; by default what
            RANK and WORLD_SIZE say, which torchrun sets. ``(0, 1)`` works alone, for a program in
            which only one of several processes calls this.

    Raises:
        BlockingIOError: another process, or another job, is making target_dir.
        FileExistsError: target_dir exists.
        FileNotFoundError: source_dir has no ``config.json`` or no safetensors.
        ImportError: transformers is not installed.
        OSError: a file cannot be written; what was, is taken up by the next call.
        TimeoutError: of the processes that share the work one did not come, or has been silent
            for five minutes; the message names it.
        TypeError: an argument is of another type.
        ValueError: an option is not supported, a file is not whole, files, index and the model's
            own sizes do not agree, transformers does not know the model, no layer is left to
            quantize, or a weight holds NaN or an infinity; the message names file and tensor.
    """
    with Ranks(*check_ranks(ranks)) as processes:
        block_size, scale = check_block_size(block_size), check_scale(scale)
        if not isinstance(double_quant, bool):
            raise TypeError(f"double_quant: expected a bool, got {type(double_quant).__name__}")
        check_callback(progress, "progress")
        skip = None if skip_modules is None else check_skip_modules(skip_modules)
        target = check_new(target_dir, "target_dir")
        shards = open_source(source_dir)
        options = {"block_size": block_size, "double_quant": double_quant, "scale": scale}
        # Of what rank 0 warns of, the others do not
        with warnings.catch_warnings(action="ignore") if processes.rank else nullcontext():
            plan = architectures().make_plan(shards.folder, skip, options, shards)

        made_as = {"quantized": plan.config, "layers": sorted(plan.layers.items())}
        with Rewriting(shards, target, made_as, processes) as work:
            after = work.write_all(partial(_quantized, shards, plan, options), progress)
            config = read_json(shards.folder / "config.json")
            work.finish(config | {"quantization_config": plan.config})
        before = sum(held.nbytes for held in shards.tensors.values())
        return QuantizedCheckpoint(len(plan.layers), before, after)


def _quantized(shards: Shards, plan: Plan, options: dict[str, Any], file: str) -> dict[str, Tensor]:
    """Return what a file becomes."""
    tensors: dict[str, Tensor] = {}
    for name in shards.names_in(file):
        tensor = shards.tensor(name)
        if name not in plan.layers:
            tensors[name] = tensor
            continue
        weight = tensor.T if plan.layers[name] else tensor
        try:
            q = quantize(weight, **options, check=True)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{shards.folder / file}: {name}: {error}") from error
        for part, found in zip(PARTS, q.parts(), strict=True):
            if found is not None:
                tensors[name.removesuffix("weight") + part] = found
        if name == next(iter(plan.layers)):
            tensors[name] = mark()
    return tensors
