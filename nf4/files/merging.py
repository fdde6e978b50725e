"""Fold an adapter into a folder of weights, dense or in four bits: dense ones, one at a time."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nf4.adapters.lora import LoRA
from nf4.adapters.term import Base, Folded, Term, base_of, fold
from nf4.files.adapters import CONFIG_NAME, WEIGHTS_NAME, AdapterFile
from nf4.files.architectures import Place
from nf4.files.card import add_merged_card
from nf4.files.formats import check_dtype
from nf4.files.merge_plan import (
    FLOATS,
    Key,
    MergePlan,
    Original,
    dtype_of,
    is_pissa,
    make_plan,
    read_config,
)
from nf4.files.rewriting import Rewriting, open_source
from nf4.models.quantize import check_callback
from nf4.models.starts import Start, initialize
from nf4.tensor import NF4Tensor
from nf4.tools.paths import check_adapter_folder, check_model_folder, check_new
from nf4.tools.streamed import NAMES, Streamed

_CHUNK = 1 << 18  # elements that are compared at a time, in a core's cache


@dataclass(frozen=True)
class LayerError:
    """How far a merged weight is from what it should be, as ratios of Frobenius norms.

    Attributes:
        name: of the layer.
        relative: of what rounding to the dtype changed, to base plus adapter.
        of_update: of the same to what the adapter adds; at 1 the adapter is lost. None without an
            adapter, or of one that adds nothing.
        from_original: of the distance from original plus adapter, to that: what quantization cost.
            None without original.
    """

    name: str
    relative: float
    of_update: float | None
    from_original: float | None


@dataclass(frozen=True)
class MergedCheckpoint:
    """What `merge_checkpoint` wrote.

    Attributes:
        layers: the error of each weight that was in four bits or has an adapter.
        adapted: how many have one.
        dtype: of the weights.
        relative: as of a layer, of all of them together.
        from_original: as of a layer, of all that the original has.
        bytes_after: of all tensors written.
    """

    layers: list[LayerError]
    adapted: int
    dtype: str
    relative: float
    from_original: float | None
    bytes_after: int


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    original: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergedCheckpoint:
    """Fold an adapter into a transformers folder, and write it as a dense one.

    Weights are made dense in fp32, the adapter is folded into them in fp32, and the result is
    rounded once: bit for bit what opening base in fp32, `nf4.load_adapter`, `nf4.merge` and a cast
    to dtype give; of a 4-bit base, opened in dtype too. One weight is in memory at a time. A file
    is written for each file of base; until all is done they lie in a hidden folder beside target,
    and after an interruption the next call goes on. Experts of a mixture become dense. An adapter
    on an output layer that is tied to the embeddings unties it. What transformers keeps in fp32
    stays so. Tokenizers and other files are copied, an adapter that lies beside the base is not.

    Args:
        base: folder with ``config.json`` and safetensors, 4-bit by nf4 or bitsandbytes, or dense.
        adapter: folder with PEFT's two files, or those of another kind of nf4.
        target: folder to make.
        dtype: "bf16", "fp16" or "fp32", or torch's; by default that of base's config.
        original: folder of the weights before quantization, to measure from; needed for an adapter
            that started by PiSSA from them, on a base that is as `nf4.quantize_model` makes it.
        progress: called with (files done, files in all).

    Returns:
        The errors.

    Raises:
        BlockingIOError: another process is making target.
        FileExistsError: target exists.
        FileNotFoundError: base has no ``config.json`` or no safetensors, adapter not both of its
            files, or original no weights.
        ImportError: transformers is not installed.
        OSError: a file cannot be written; what was, is taken up by the next call.
        TypeError: progress is no function.
        ValueError: dtype is not known, a file is corrupt, the adapter is of no kind known here or
            does not fit the base, another method has quantized the base, original holds other
            weights, or dtype cannot hold a merged weight; the message names file and tensor.
    """
    check_callback(progress, "progress")
    wanted = None if dtype is None else check_dtype(dtype)
    folder = check_new(target, "target_dir")
    shards = open_source(check_model_folder(base, "base"))
    path = check_adapter_folder(adapter, "adapter")
    file = AdapterFile.read(path)
    config = read_config(shards.folder / "config.json")
    if (shards.folder / CONFIG_NAME).is_file() and not shards.folder.samefile(path):
        raise ValueError(
            f"base: expected a folder without an adapter of its own, {shards.folder} has one; "
            "merge that first"
        )
    wanted = wanted or dtype_of(config, shards)
    before = None if original is None else Original.read(original)
    plan = make_plan(shards, config, file, wanted, before)

    hashes = [hashlib.sha256((path / n).read_bytes()).hexdigest() for n in _ADAPTER]
    stamp = None if before is None else before.stamp()
    made_as = {"merged": hashes, "dtype": wanted, "config": config, "original": stamp}
    with Rewriting(shards, folder, made_as) as work:
        after = work.write_all(partial(_merged, plan, work.notes), progress)
        said = {
            "base": shards.folder.resolve().name,
            "bits": " in four bits" if plan.stored else "",
            "adapter": path.resolve().name,
            "kind": file.kind.peft_type,
            "dtype": wanted,
        }
        work.finish(_config(config, wanted, plan.untied), partial(_card, said), _ADAPTER)
    rows = [row for name in shards.files for row in work.notes.get(name, ())]
    return _report(rows, len(plan.adapted), wanted, after)


_ADAPTER = (CONFIG_NAME, WEIGHTS_NAME)


def _card(said: Mapping[str, str], folder: Path) -> None:
    add_merged_card(folder, said)


def _config(config: Mapping[str, Any], dtype: str, untied: bool) -> dict[str, Any]:
    """Return the config of the dense model, and of the models within it."""
    found = {key: value for key, value in config.items() if key != "quantization_config"}
    for key, value in found.items():
        if isinstance(value, dict) and key.endswith("_config"):
            found[key] = _within(value, dtype, untied)
    found = _within(found, dtype, untied)
    if not found.keys() & {"dtype", "torch_dtype"}:
        found["dtype"] = dtype
    if untied:
        found["tie_word_embeddings"] = False
    return found


def _within(config: Mapping[str, Any], dtype: str, untied: bool) -> dict[str, Any]:
    changes = {key: dtype for key in ("dtype", "torch_dtype") if config.get(key)}
    if untied and config.get("tie_word_embeddings"):
        return {**config, **changes, "tie_word_embeddings": False}
    return {**config, **changes}


def _merged(plan: MergePlan, notes: dict[str, Any], file: str) -> Streamed:
    """Return what a file becomes; its errors are noted as its tensors are made."""
    rows: list[Any] = []
    notes[file] = rows
    names = list(plan.tensors_in(file))
    return Streamed({name: _form(plan, name) for name in names}, _Maker(plan, rows).make)


def _form(plan: MergePlan, name: str) -> tuple[str, int, tuple[int, ...]]:
    """Return the form of a tensor in the files of the target."""
    key = (name, None)
    if name in plan.stored or key in plan.places:
        shape = plan.stored[name].shape if name in plan.stored else plan.places[key].shape
        if key in plan.places and plan.places[key].turned:
            shape = shape[::-1]
        dtype = _dtype(plan, name)
        return NAMES[dtype], dtype.itemsize, shape
    held = plan.shards.tensors[name]
    if held.dtype not in FLOATS:
        return held.dtype, held.nbytes // max(math.prod(held.shape), 1), held.shape
    dtype = _dtype(plan, name)
    return NAMES[dtype], dtype.itemsize, held.shape


def _dtype(plan: MergePlan, name: str) -> torch.dtype:
    """Return the dtype of a floating tensor in the files of the target."""
    wide = name in plan.layout.wide and name not in plan.stored
    return torch.float32 if wide else plan.dtype


class _Maker:
    """Makes tensors of the target, one at a time.

    Args:
        plan: of all of them.
        rows: takes the sums that errors are made of.
    """

    def __init__(self, plan: MergePlan, rows: list[Any]) -> None:
        self.plan, self.rows = plan, rows
        self.biases: dict[str, Tensor] = {}  # with the adapter folded in, until their turn
        tensors = {parameter: name for parameter, name in plan.layout.biases.items()}
        places = ((key, plan.places[key]) for key in plan.adapted)
        self.bias_of = {
            key: tensors[f"{place.layer}.bias"]
            for key, place in places
            if f"{place.layer}.bias" in tensors
        }
        self.folded_with = {bias: key for key, bias in self.bias_of.items()}

    @torch.no_grad()
    def make(self, name: str) -> Tensor:
        """Return a tensor of the target."""
        plan = self.plan
        if name in plan.stored and plan.stored[name].layer.kind == "experts":
            found = torch.empty(plan.stored[name].shape, dtype=plan.dtype)
            for number in range(len(found)):
                found[number] = self._weight((name, number))
            return found
        if (name, None) in plan.places:
            weight = self._weight((name, None))
            return weight.T if plan.places[name, None].turned else weight
        if name in self.folded_with and name not in self.biases:
            self._fold(self.folded_with[name])
        tensor = self.biases.pop(name, None)
        if tensor is None:
            tensor = plan.biases.get(name)
        tensor = plan.shards.tensor(name) if tensor is None else tensor
        if plan.shards.tensors[name].dtype not in FLOATS:
            return tensor
        return self._round(name, tensor, _dtype(plan, name))

    def _weight(self, key: Key) -> Tensor:
        """Return a weight with its adapter folded in, rounded, and note its error."""
        place = self.plan.places[key]
        base, exact, term = self._fold(key)
        found = self._round(place.becomes, exact, _dtype(self.plan, place.becomes))
        row: list[Any] = [place.layer, *_sums(found, exact), None, None, None]
        if term is not None:
            row[3] = _sums(exact, base.dense())[0]
        expected = self._from_original(key, term)
        if expected is not None:
            row[4:] = _sums(found, expected)
        self.rows.append(row)
        return found

    def _fold(self, key: Key) -> tuple[Base, Tensor, Term | None]:
        """Return a layer's base, its weight with the adapter folded in, and the adapter's term."""
        plan, place = self.plan, self.plan.places[key]
        name = self.bias_of.get(key)
        base = plan.base(place)
        adapter = plan.adapter(key, base)
        if adapter is None:
            return base, base.dense(), None
        if is_pissa(plan.file) and isinstance(adapter, LoRA):
            base = base_of(self._start(place, base, adapter).q)
        if name is not None:
            value = plan.biases.get(name)
            value = plan.shards.tensor(name) if value is None else value
            base = base_of(base.weight, value.float())
        term = adapter.merged_term()
        folded: Folded = fold(base, [term])
        if name is not None and folded[1] is not None:
            self.biases[name] = folded[1]
        return base, folded[0], term

    def _start(self, place: Place, base: Base, adapter: LoRA) -> Start:
        """Return how an adapter by PiSSA started, and the base that it changed."""
        assert isinstance(base.weight, NF4Tensor)
        dense = None if self.plan.source is None else self.plan.source(place.layer)
        return initialize("pissa", base.weight, dense, adapter.r, adapter.scaling)

    def _from_original(self, key: Key, term: Term | None) -> Tensor | None:
        """Return a weight as it would be without quantization; None if that is not known."""
        plan, place = self.plan, self.plan.places[key]
        weight = None if plan.original is None else plan.original.weight(place)
        if weight is None or term is None:
            return weight
        base = plan.base(place)
        adapter = plan.adapter(key, base)
        if is_pissa(plan.file) and isinstance(adapter, LoRA):
            start = self._start(place, base, adapter)
            weight = torch.addmm(weight, start.lora_B, start.lora_A, alpha=-adapter.scaling)
        return fold(Base(weight), [term])[0]

    def _round(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor in a dtype, or raise ValueError if that cannot hold it."""
        found = tensor.to(dtype)
        merged = (name, None) in self.plan.places or name in self.plan.stored
        narrow = dtype == torch.float16 and _is_finite(tensor)
        if (merged or narrow) and not _is_finite(found):
            raise ValueError(
                f"{self.plan.shards.folder}: {name}: expected base plus adapter that {dtype} can "
                "hold, got NaN or an infinity"
            )
        return found


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite, without a tensor of answers."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _chunks(tensor: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK // max(1, tensor[:1].numel()))
    yield from (slice(first, first + rows) for first in range(0, len(tensor), rows))


def _sums(found: Tensor, exact: Tensor) -> list[float]:
    """Return the sums of squares of found - exact and of exact: of each chunk in its dtype."""
    off = size = 0.0
    for rows in _chunks(exact):
        wide = exact[rows].reshape(-1)
        difference = found[rows].reshape(-1).to(wide.dtype).sub(wide)
        off += torch.dot(difference, difference).item()
        size += torch.dot(wide, wide).item()
    return [off, size]


def _ratio(off: float, size: float) -> float:
    return math.sqrt(off / size) if size else 0.0 if not off else math.inf


def _report(rows: list[Any], adapted: int, dtype: str, after: int) -> MergedCheckpoint:
    """Return the errors of layers, and of all together, of their sums of squares."""
    layers = []
    for name, off, size, update, distance, expected in sorted(rows, key=lambda row: row[0]):
        of_update = math.sqrt(off / update) if update else None
        cost = None if expected is None else _ratio(distance, expected)
        layers.append(LayerError(name, _ratio(off, size), of_update, cost))
    known = [row for row in rows if row[5] is not None]
    cost = _ratio(sum(r[4] for r in known), sum(r[5] for r in known)) if known else None
    total = _ratio(sum(row[1] for row in rows), sum(row[2] for row in rows))
    return MergedCheckpoint(layers, adapted, dtype, total, cost, after)
