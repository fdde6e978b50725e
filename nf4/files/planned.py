"""What `nf4.quantize_checkpoint` would make of a folder, without a weight being read."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nf4.files.architectures import architectures
from nf4.files.rewriting import open_source
from nf4.models.selection import check_skip_modules, is_below
from nf4.ops.checks import check_block_size, check_scale
from nf4.tensor import part_forms

# Why a tensor stays dense
SKIPPED, VECTOR = "skip_modules", "one dimension: norms, biases"
OTHER, EXPERTS = "no linear layer: embeddings and others", "experts of a mixture, or a convolution"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a folder, and what it would become.

    Attributes:
        name: in the files.
        shape: its sizes.
        bytes_before: in the source.
        bytes_after: in the target.
        stays: why it stays dense; empty for a weight that would be quantized.
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    stays: str


def plan_checkpoint(
    source_dir: str | os.PathLike[str],
    skip_modules: str | Iterable[str] | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    scale: str = "absmax",
) -> list[PlannedTensor]:
    """Return what `nf4.quantize_checkpoint` would make of each tensor; nothing is written.

    Args:
        source_dir: folder with ``config.json`` and safetensors, of which only headers are read.
        skip_modules: as for `nf4.quantize_checkpoint`.
        block_size: elements that share one scale.
        double_quant: quantize the scales to 8 bits too.
        scale: how scales would be found.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: as `nf4.quantize_checkpoint`.
    """
    options = {
        "block_size": check_block_size(block_size),
        "double_quant": double_quant,
        "scale": check_scale(scale),
    }
    skip = None if skip_modules is None else check_skip_modules(skip_modules)
    shards = open_source(source_dir)
    plan = architectures().make_plan(shards.folder, skip, options, shards)
    skipped = plan.config["skip_modules"]
    planned = []
    for name, held in shards.tensors.items():
        if name in plan.layers:
            forms = part_forms(torch.Size(held.shape), block_size, double_quant).values()
            after = sum(dtype.itemsize * shape.numel() for dtype, shape in forms)
            planned.append(PlannedTensor(name, held.shape, held.nbytes, after, ""))
            continue
        if len(held.shape) < 2:
            why = VECTOR
        elif is_below(name.rpartition(".")[0], skipped):
            why = SKIPPED
        else:
            why = OTHER if len(held.shape) == 2 else EXPERTS
        planned.append(PlannedTensor(name, held.shape, held.nbytes, held.nbytes, why))
    return planned
