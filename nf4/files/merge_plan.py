"""Where an adapter's file goes in a folder of weights, all checked before anything is written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nf4.adapters.lora import LoRA
from nf4.adapters.term import Adapter, Base, base_of
from nf4.files.adapters import CONFIG_NAME, AdapterFile
from nf4.files.architectures import Layout, Place, architectures
from nf4.files.checkpoint import FROM_ORIGINAL
from nf4.files.formats import DTYPE_NAMES
from nf4.files.stored import StoredWeight, stored_weights
from nf4.layers.linear import LinearNF4
from nf4.models.starts import Source, check_rank, dense_source
from nf4.tensor import NF4Tensor
from nf4.tools.paths import check_model_folder
from nf4.tools.shards import Shards, read_json

Key = tuple[str, int | None]  # what a weight becomes, and the number of an expert
FLOATS = ("F64", "F32", "F16", "BF16")  # what is rounded to the dtype; all else is copied


@dataclass(frozen=True)
class Original:
    """The dense weights before quantization, in the files of a folder."""

    shards: Shards

    @classmethod
    def read(cls, path: Any) -> "Original":
        """Read the headers.

        Raises:
            FileNotFoundError: there is no such folder, or no safetensors in it.
            ValueError: it has been quantized.
        """
        folder = check_model_folder(path, "original")
        if "quantization_config" in read_config(folder / "config.json"):
            raise ValueError(f"original: expected dense weights, {folder} has been quantized")
        try:
            return cls(Shards.read(folder))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"original: {error}") from error

    def stamp(self) -> list[Any]:
        """Return what tells its files from others: names, bytes, times."""
        files = [(name, (self.shards.folder / name).stat()) for name in self.shards.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]

    def find(self, place: Place) -> str | None:
        """Return the name of a weight in these files, if it is there.

        Raises:
            ValueError: it is, in another shape.
        """
        names = (place.becomes, f"{place.layer}.weight", place.tensor)
        name = next((name for name in names if name in self.shards.tensors), None)
        if name is None:
            return None
        shape = place.shape[::-1] if place.turned else place.shape
        held = self.shards.tensors[name].shape
        if (held if place.number is None else held[1:]) != shape:
            raise ValueError(f"original: expected shape {shape} of {name}, got {held}")
        return name

    def weight(self, place: Place) -> Tensor | None:
        """Return a weight, float32 ``[N, K]``; None if it is not there."""
        name = self.find(place)
        if name is None:
            return None
        tensor = self.shards.tensor(name)
        tensor = tensor if place.number is None else tensor[place.number]
        return (tensor.T if place.turned else tensor).float()


@dataclass(frozen=True)
class MergePlan:
    """What becomes of a folder's tensors.

    Attributes:
        shards: the files.
        dtype: of dense weights.
        own_dtype: that layers have where the folder is opened, in which a start changed them.
        file: of the adapter.
        stored: the weights in four bits by what they become.
        layout: of the folder's model.
        places: of weights that are measured, by what they become.
        adapted: modules of the adapter's file by what they are folded into.
        biases: tensors by the values that go there.
        untied: whether the model ties no weights any more.
        original: the weights before quantization.
        source: the same for an adapter whose start took them.
    """

    shards: Shards
    dtype: torch.dtype
    own_dtype: torch.dtype
    file: AdapterFile
    stored: dict[str, StoredWeight]
    layout: Layout
    places: dict[Key, Place]
    adapted: dict[Key, str]
    biases: dict[str, Tensor]
    untied: bool
    original: Original | None
    source: Source | None

    def tensors_in(self, file: str) -> Iterator[str]:
        """Yield the names of the dense tensors that a file is to hold."""
        parts = {part for weight in self.stored.values() for part in weight.parts()}
        for name in self.shards.names_in(file):
            if name not in parts and not is_mark_of(self.shards, name):
                yield name
        for name, weight in self.stored.items():
            if self.shards.tensors[weight.first].file == file:
                yield name
        for key, place in self.places.items():
            if place.becomes != place.tensor and key in self.adapted:
                first = self.stored[place.tensor].first if place.tensor in self.stored else None
                if self.shards.tensors[first or place.tensor].file == file:
                    yield place.becomes

    def adapter(self, key: Key, base: Base) -> Adapter | None:
        """Return the adapter of a weight on its base."""
        module = self.adapted.get(key)
        return None if module is None else adapter_of(self.file, module, base)

    def base(self, place: Place) -> Base:
        """Return the product of a layer in the files, without its bias."""
        stored = self.stored.get(place.tensor)
        if stored is not None:
            return base_of(stored.read(place.number or 0, self.own_dtype))
        tensor = self.shards.tensor(place.tensor)
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        return Base(tensor.T if place.turned else tensor)


def is_pissa(file: AdapterFile) -> bool:
    """Return whether an adapter's start changed its base."""
    return issubclass(file.kind, LoRA) and file.config.get("init_lora_weights") == "pissa"


def is_mark_of(shards: Shards, name: str) -> bool:
    """Return whether a tensor in files is a mark of 4-bit weights, by its form."""
    held = shards.tensors[name]
    return held.shape == (0,) and held.dtype == "U8"


def read_config(file: Any) -> dict[str, Any]:
    """Return the mapping in a ``config.json``, or raise ValueError if it is none."""
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a mapping, got {type(config).__name__}")
    return config


def dtype_of(config: Mapping[str, Any], shards: Shards) -> str:
    """Return the dtype that a folder opens in; by its tensors if its config does not say.

    Raises:
        ValueError: it is another than weights are written in here.
    """
    said = config.get("dtype") or config.get("torch_dtype")
    if said is None:
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        sizes = dict.fromkeys(names, 0)
        for held in shards.tensors.values():
            if held.dtype in sizes and len(held.shape) > 1:
                sizes[held.dtype] += held.nbytes
        best = max(sizes, key=lambda name: sizes[name])
        return names[best] if sizes[best] else "bfloat16"
    if not isinstance(said, str) or said not in DTYPE_NAMES.values():
        known = " or ".join(DTYPE_NAMES.values())
        raise ValueError(f"{shards.folder / 'config.json'}: expected dtype {known}, got {said!r}")
    return said


def make_plan(
    shards: Shards,
    config: Mapping[str, Any],
    file: AdapterFile,
    dtype: str,
    original: Original | None,
) -> MergePlan:
    """Find where all of an adapter goes.

    Args:
        shards: the files of the base.
        config: of its ``config.json``.
        file: of the adapter.
        dtype: of the merged weights, as ``config.json`` calls it.
        original: the weights before quantization.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the adapter does not fit, its values are not finite, or weights that the model
            ties would have to be told apart in a way that its config cannot say.
    """
    stored = {weight.layer.becomes: weight for weight in stored_weights(shards, config)}
    parts = {part for weight in stored.values() for part in weight.parts()}
    names = [n for n in shards.tensors if n not in parts and not is_mark_of(shards, n)]
    layers = [weight.layer for weight in stored.values()]
    layout = architectures().layout(shards, layers, [*names, *stored], dtype)
    adapted = _place_all(shards, stored, layout, file)
    places = _measured(stored, layout, adapted)
    biases = _biases(shards, layout, file)
    untied = _unties(shards, stored, layout, places, adapted)
    own = getattr(torch, dtype_of(config, shards))
    source = None
    if is_pissa(file) and file.metadata.get(FROM_ORIGINAL) == "True":
        held = {places[key].layer: places[key] for key in adapted}
        bases = {n: _Lazy(stored[p.tensor], p.number or 0, own) for n, p in held.items()}
        folder = None if original is None else original.shards.folder
        source = dense_source(folder, cast(dict[str, LinearNF4], bases), needed=True)
    if original is not None:
        for place in places.values():
            linear = place.number is None and place.becomes in _tensors_of(layout)
            if original.find(place) is None and linear:
                raise ValueError(f"original: expected a weight {place.becomes!r}, found none")
    return MergePlan(
        *(shards, getattr(torch, dtype), own, file, stored, layout, places, adapted, biases),
        *(untied, original, source),
    )


def _tensors_of(layout: Layout) -> set[str]:
    """Return the names of the weights of a model's linear layers."""
    return {place.becomes for place in layout.places.values()}


@dataclass(frozen=True)
class _Lazy:
    """What `dense_source` compares the weight before quantization with, read when asked."""

    stored: StoredWeight
    number: int
    dtype: torch.dtype

    @property
    def weight(self) -> NF4Tensor:
        return self.stored.read(self.number, self.dtype)


def adapter_of(file: AdapterFile, module: str, base: Base) -> Adapter:
    """Return the adapter of a module in a file, or raise ValueError if it does not fit its base."""
    try:
        return file.kind.from_file(base, file.config, module, file.tensors[module])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file.folder}: {module}: {error}") from error


def _place_all(
    shards: Shards, stored: Mapping[str, StoredWeight], layout: Layout, file: AdapterFile
) -> dict[Key, str]:
    """Return the modules of an adapter's file by the weights that they are folded into."""
    adapted: dict[Key, str] = {}
    for module, tensors in file.tensors.items():
        place = layout.places.get(module)
        if place is None:
            raise ValueError(
                f"{file.weights}: expected adapters of linear layers of this model, "
                f"got one of {module!r}, which it does not have"
            )
        if not all(tensor.float().isfinite().all() for tensor in tensors.values()):
            raise ValueError(
                f"{file.folder}: {module}: expected finite values, got NaN or an infinity"
            )
        base = Base(torch.empty(place.shape, device="meta"))
        adapter = adapter_of(file, module, base)
        _check_base(shards, stored, place)
        if is_pissa(file) and isinstance(adapter, LoRA):
            if place.tensor not in stored:
                raise ValueError(
                    f"{file.folder / CONFIG_NAME}: {module}: expected a weight in four bits for an "
                    "adapter that started by pissa, got a dense one"
                )
            check_rank(adapter.r, cast(NF4Tensor, base.weight), "pissa")
        known = file.tensors[adapted.setdefault((place.becomes, place.number), module)]
        if known.keys() != tensors.keys() or not all(
            torch.equal(known[part], tensor) for part, tensor in tensors.items()
        ):
            raise ValueError(
                f"{file.weights}: {module}: expected the tensors of the layer's other name, "
                "got different ones"
            )
    return adapted


def _check_base(shards: Shards, stored: Mapping[str, StoredWeight], place: Place) -> None:
    """Raise ValueError unless a layer's weight is in the files in its shape, in floats."""
    if place.tensor in stored:
        shape: tuple[int, ...] = stored[place.tensor].layer.shape
        if shape != place.shape:
            raise ValueError(
                f"{shards.folder}: {place.tensor}: expected shape {place.shape}, got {shape}"
            )
        return
    held = shards.tensors[place.tensor]
    wanted = place.shape[::-1] if place.turned else place.shape
    if held.shape != wanted or held.dtype not in FLOATS:
        raise ValueError(
            f"{shards.folder / held.file}: {place.tensor}: expected floats of shape {wanted}, got "
            f"{held.dtype} {held.shape}"
        )


def _measured(
    stored: Mapping[str, StoredWeight], layout: Layout, adapted: Mapping[Key, str]
) -> dict[Key, Place]:
    """Return the place of every weight that is in four bits or has an adapter."""
    known: dict[Key, Place] = {}
    for place in layout.places.values():
        known.setdefault((place.becomes, place.number), place)
    found = {key: known[key] for key in adapted}
    for name, weight in stored.items():
        count = len(weight.layer.names) if weight.layer.kind == "experts" else None
        for number in [None] if count is None else range(count):
            form = (name.removesuffix(".weight"), name, name, weight.layer.shape, False, number)
            found.setdefault((name, number), known.get((name, number)) or Place(*form))
    return found


def _biases(shards: Shards, layout: Layout, file: AdapterFile) -> dict[str, Tensor]:
    """Return the trained biases of an adapter's file by the tensors whose places they take."""
    if file.biases and file.bias == "none":
        raise ValueError(
            f"{file.weights}: expected no bias with bias='none', got {next(iter(file.biases))!r}"
        )
    found = {}
    for name, value in file.biases.items():
        tensor = layout.biases.get(name.replace(".base_layer.bias", ".bias"))
        shape = None if tensor is None else shards.tensors[tensor].shape
        if tensor is None or shape != tuple(value.shape) or not value.isfinite().all():
            raise ValueError(
                f"{file.weights}: {name}: expected the bias of a layer of this model, of shape "
                f"{shape} and finite, got {tuple(value.shape)}"
            )
        found[tensor] = value
    return found


def _unties(
    shards: Shards,
    stored: Mapping[str, StoredWeight],
    layout: Layout,
    places: Mapping[Key, Place],
    adapted: Mapping[Key, str],
) -> bool:
    """Return whether an adapter, or four bits of one of them, tells tied weights apart.

    Raises:
        ValueError: it does so where the model ties others too, of which its config speaks at once.
    """
    named = {places[key].layer + ".weight" for key in adapted}
    both = {place.layer + ".weight" for (name, _), place in places.items() if name in stored}
    apart = {
        target
        for target, source in layout.ties.items()
        if named & {target, source} or (target in both and source not in both)
    }
    if apart and apart != layout.ties.keys():
        left = min(layout.ties.keys() - apart)
        raise ValueError(
            f"{shards.folder}: expected weights that can be told apart, got an adapter on "
            f"{min(apart)}, which config.json ties together with {left}"
        )
    if any(named & {source} for source in layout.ties.values()):
        raise ValueError(
            f"{shards.folder}: expected no adapter on a weight that others are tied to, got one on "
            f"{min(named & set(layout.ties.values()))}"
        )
    return bool(apart)
