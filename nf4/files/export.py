"""Write a folder of 4-bit weights in the files of other programs, a layer at a time.

bitsandbytes: the same codes and scales under the names, and with the config, that transformers and
servers open without nf4. What bitsandbytes does not have in four bits becomes dense.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nf4.files.architectures import StoredLayer, architectures
from nf4.files.formats import check_format
from nf4.files.rewriting import Rewriting, open_source
from nf4.files.stored import read_weight
from nf4.functional import dequantize
from nf4.layers.bitsandbytes import tensors_of
from nf4.models.quantize import check_callback
from nf4.tensor import DTYPES, PARTS, is_mark
from nf4.tools.paths import check_new
from nf4.tools.shards import Shards, read_json

# As config.json calls them
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class ExportedCheckpoint:
    """What `export_checkpoint` wrote.

    Attributes:
        layers: how many weights stay in four bits.
        dense: how many became dense.
        bytes_after: of all tensors written.
    """

    layers: int
    dense: int
    bytes_after: int


def export_checkpoint(
    source_dir: str | os.PathLike[str],
    target_dir: str | os.PathLike[str],
    format: str = "bitsandbytes",
    progress: Callable[[int, int], None] | None = None,
) -> ExportedCheckpoint:
    """Write a folder of 4-bit weights as one that needs no nf4.

    ``bitsandbytes`` is what ``BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")``
    saves. Embeddings, and experts that are tensors of all of them, become dense: bitsandbytes has
    them not in four bits. Adapters beside the weights, tokenizers and other files are copied.

    Args:
        source_dir: folder that ``save_pretrained`` or `nf4.quantize_checkpoint` wrote.
        target_dir: folder to make; an interrupted run is taken up by the next one.
        format: "bitsandbytes".
        progress: called with (files done, files in all).

    Raises:
        BlockingIOError: another process is making target_dir.
        FileExistsError: target_dir exists.
        FileNotFoundError: source_dir has no ``config.json`` or no safetensors.
        ImportError: transformers is not installed.
        TypeError: progress is no function.
        ValueError: format is not known, source_dir holds no weights of nf4, or a file is not whole;
            the message names file and tensor.
    """
    check_format(format)
    check_callback(progress, "progress")
    target = check_new(target_dir, "target_dir")
    shards = open_source(source_dir)
    config = read_json(shards.folder / "config.json")
    said = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(said, dict) or said.get("quant_method") != "nf4":
        kind = said.get("quant_method") if isinstance(said, dict) else "none"
        raise ValueError(
            f"{shards.folder / 'config.json'}: expected a quantization_config of nf4, got {kind}"
        )
    layers, dense_names = architectures().stored_layers(shards.folder, shards, said)
    by_file: dict[str, list[StoredLayer]] = {}
    for layer in layers:
        by_file.setdefault(shards.tensors[f"{layer.names[0]}.packed"].file, []).append(layer)
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"{shards.folder / 'config.json'}: expected dtype {' or '.join(_DTYPES)}, got {dtype!r}"
        )
    theirs = _config(said, dtype, dense_names)
    made_as = {"format": format, "config": theirs, "layers": [str(layer) for layer in layers]}
    with Rewriting(shards, target, made_as) as work:
        make = partial(_exported, shards, by_file, _DTYPES[dtype])
        after = work.write_all(make, progress)
        work.finish(config | {"quantization_config": theirs})
    linear = sum(layer.kind == "linear" for layer in layers)
    return ExportedCheckpoint(linear, len(layers) - linear, after)


def _exported(
    shards: Shards, by_file: Mapping[str, list[StoredLayer]], dtype: torch.dtype, file: str
) -> dict[str, Tensor]:
    """Return what a file becomes."""
    tensors: dict[str, Tensor] = {}
    for name in shards.names_in(file):
        if name.rpartition(".")[2] not in PARTS:
            tensor = shards.tensor(name)
            if not is_mark(tensor):
                tensors[name] = tensor
    for layer in by_file.get(file, ()):
        weights = [read_weight(shards, name, layer, dtype) for name in layer.names]
        if layer.kind == "linear":
            tensors |= tensors_of(weights[0], layer.becomes)
        else:
            dense = [dequantize(q) for q in weights]
            tensors[layer.becomes] = torch.stack(dense) if layer.kind == "experts" else dense[0]
    return tensors


def _config(said: Mapping[str, Any], dtype: str, dense: list[str]) -> dict[str, Any]:
    """Return bitsandbytes' config in the words of transformers' ``BitsAndBytesConfig``."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": said.get("double_quant", True),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": dense,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
