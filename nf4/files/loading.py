"""Load adapters of any kind: a file is read, a plan says where all of it goes, then it is applied.

What does not fit is refused while the plan is made, before anything is changed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nf4.adapters.layer import AdaptedLayer, BaseChange, adapted_layers, check_adapter_name
from nf4.adapters.lora import LoRA
from nf4.adapters.term import Adapter
from nf4.files.adapters import CONFIG_NAME, AdapterFile, file_name
from nf4.files.checkpoint import FROM_ORIGINAL, adapter_layers
from nf4.layers.linear import LinearNF4
from nf4.models.adapt import (
    adapter_names,
    call_layers,
    check_name_is_free,
    check_parts,
    freeze_base,
    layer_base,
    linear_layers,
    set_adapter,
    train_biases,
    unwrapped,
    with_adapter,
)
from nf4.models.hosts import tell_hosts
from nf4.models.quantize import check_model, check_no_peft, replace_layers
from nf4.models.starts import Source, dense_source, initialize
from nf4.tools.ranks import copy_whole, reshard

Original = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None


@torch.no_grad()
def restore_adapter(model: nn.Module, path: str | os.PathLike[str], adapter_name: str) -> None:
    """Give an adapter that a model has the values of a file, in place.

    Args:
        model: a module with adapters.
        path: folder with the two files.
        adapter_name: of the adapter.

    Raises:
        FileNotFoundError: path or one of its two files is missing.
        ValueError: a file is corrupt, or holds another adapter than the model has; nothing is
            changed then.
    """
    reshard(model)
    model, file = unwrapped(model), AdapterFile.read(Path(path))
    held = adapter_layers(model, adapter_name)
    values = _find_biases(model, file, beside=False)
    if file.tensors.keys() != held.keys():
        name = min(file.tensors.keys() ^ held.keys())
        raise ValueError(
            f"{file.weights}: expected adapter {adapter_name!r} on the layers of the model, "
            f"got {'one more' if name in file.tensors else 'none'} on {name!r}"
        )
    for name, adapter in held.items():
        own, new = adapter.tensors(), file.tensors[name]
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in new.items()}:
            raise ValueError(
                f"{file.weights}: {name}: expected tensors of the shapes "
                f"{ {n: tuple(t.shape) for n, t in own.items()} }, got "
                f"{ {n: tuple(t.shape) for n, t in new.items()} }"
            )
    for name, adapter in held.items():
        adapter.copy_from(file.tensors[name])
    for parameter, value in values:
        copy_whole(parameter, value)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str | None = None,
    original: Original = None,
) -> None:
    """Put an adapter saved by `save_adapter` or by PEFT on a model.

    Without a name the model has exactly the adapter of the file afterwards, called "default";
    with one, it is put beside those that are there. It is active and trainable, all else is frozen.
    An adapter that started by PiSSA changes the base as that start did, from the same weights.

    Args:
        model: a module with linear layers, `LinearNF4` or dense; changed in place, and only after
            the whole file has been checked.
        path: folder with PEFT's two files, or those of another kind.
        adapter_name: what to call it.
        original: the weights before quantization, see `nf4.add_lora`; needed for an adapter that
            started by PiSSA from them, on a base that is as `nf4.quantize_model` makes it.

    Raises:
        FileNotFoundError: path or one of its two files is missing.
        TypeError: model is no module.
        ValueError: a file is corrupt, holds no adapter of a kind known here, or one that does not
            fit the model or its base, a layer has an adapter of that name, or, without a name, one
            of another kind; the message names the file and the tensor.
    """
    beside = adapter_name is not None
    name = "default" if adapter_name is None else adapter_name
    check_model(model)
    check_no_peft(model)
    check_adapter_name(name)
    reshard(model)
    plan = Plan(unwrapped(model), AdapterFile.read(Path(path)), name, beside)
    plan.place_all()
    plan.find_source(original)
    plan.apply()


@dataclass(frozen=True, eq=False)
class Placement:
    """What goes on one layer, which is not held: its memory is wanted while others are replaced.

    Attributes:
        name: of the layer in the model.
        adapter: new, with the values of the file.
        change: what the adapter's start changes of the base.
        starts_anew: whether the base has to be changed so.
    """

    name: str
    adapter: Adapter
    change: BaseChange | None
    starts_anew: bool


@dataclass(eq=False)
class Plan:
    """Where the adapter of a file goes on a model.

    Attributes:
        model: without what is wrapped around it.
        file: of the adapter.
        name: of the adapter.
        beside: whether the model keeps the adapters that it has.
        layers: of the model that can have adapters, by name.
        placements: by the ``id`` of their layers, for a layer may have several names.
        values: parameters and the biases that go there.
        source: finds the weights before quantization, if a start takes them.
    """

    model: nn.Module
    file: AdapterFile
    name: str
    beside: bool
    layers: dict[str, nn.Module] = field(init=False)
    placements: dict[int, Placement] = field(default_factory=dict)
    values: list[tuple[nn.Parameter, Tensor]] = field(init=False)
    source: Source | None = None

    def __post_init__(self) -> None:
        """Look at the model.

        Raises:
            ValueError: it has an adapter of that name, or of another kind, or other biases.
        """
        self.layers = linear_layers(self.model)
        if not self.beside:
            self._check_kind()
        elif self.name not in adapter_names(self.model):
            check_name_is_free(self.model, self.name, self.file.kind)
        self.values = _find_biases(self.model, self.file, self.beside)

    def place_all(self) -> None:
        """Find the layer of every adapter in the file.

        Raises:
            ValueError: there is none, or the adapter does not fit it, or a layer has to be replaced
                that is the model itself.
        """
        for module, tensors in self.file.tensors.items():
            self._place(module, tensors)
        self._check_left()
        root = self.layers.get("")
        found = None if root is None else self.placements.get(id(root))
        if root is not None and (found is None or not self._takes(root, found.adapter)):
            raise ValueError(
                "model: expected a model that holds the layers, or one layer with an adapter of "
                f"the file's kind and rank; a {type(root).__name__} alone cannot be replaced in "
                "place"
            )

    def _place(self, module: str, tensors: dict[str, Tensor]) -> None:
        """Place the adapter of one module of the file."""
        file = self.file
        name, layer = self._find_layer(module)
        try:
            if not all(t.float().isfinite().all() for t in tensors.values()):
                raise ValueError("expected finite values, got NaN or an infinity")
            adapter = file.kind.from_file(layer_base(layer), file.config, module, tensors)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file.folder}: {module}: {error}") from error
        change = None
        if isinstance(adapter, LoRA) and file.config.get("init_lora_weights") == "pissa":
            from_original = file.metadata.get(FROM_ORIGINAL) == "True"
            change = BaseChange("pissa", adapter.r, from_original, self.name)
        self._check_place(layer, adapter, change, module)
        fresh = not isinstance(layer, AdaptedLayer)
        new = Placement(name, adapter, change, change is not None and fresh)
        known = self.placements.setdefault(id(layer), new).adapter.tensors()
        if not all(torch.equal(known[part], t) for part, t in adapter.tensors().items()):
            raise ValueError(
                f"{file.weights}: {module}: expected the tensors of the layer's other name, "
                "got different ones"
            )

    def find_source(self, original: Original) -> None:
        """Find the weights from which bases are changed as a start did it.

        Raises:
            TypeError, ValueError, FileNotFoundError: original is not what that needs.
        """
        placed = self.placements.values()
        starting = {
            file_name(p.name): layer
            for p in placed
            if p.starts_anew and isinstance(layer := self.layers[p.name], LinearNF4)
        }
        if starting and any(p.change is not None and p.change.from_original for p in placed):
            self.source = dense_source(original, starting, needed=True)

    def apply(self) -> None:
        """Put everything in its place."""
        replace_layers(self.model, self.layers, self._convert)
        call_layers(self.model)
        freeze_base(self.model)
        set_adapter(self.model, self.name)
        train_biases(self.model, self.file.bias if not self.beside else "none")
        with torch.no_grad():
            for parameter, value in self.values:
                copy_whole(parameter, value)
        tell_hosts(self.model)

    def _convert(self, layer: nn.Module) -> nn.Module:
        """Return what a layer becomes."""
        placed = self.placements.get(id(layer))
        if placed is None:
            if self.beside or not isinstance(layer, AdaptedLayer):
                return layer
            return layer.to_base()
        adapter, change = placed.adapter, placed.change
        if placed.starts_anew and change is not None and isinstance(adapter, LoRA):
            dense = None if self.source is None else self.source(file_name(placed.name))
            base: Any = layer
            start = initialize(change.kind, base.weight, dense, change.r, adapter.scaling)
            layer = LinearNF4.from_weight(start.q, base.bias).take_after(base)
        adapted = self._put_on(layer, adapter)
        adapted.base_change = change or adapted.base_change
        return adapted

    def _put_on(self, layer: nn.Module, adapter: Adapter) -> AdaptedLayer:
        """Return a layer with an adapter; itself if it can take the adapter, or its values."""
        if not isinstance(layer, AdaptedLayer) or (self.beside and self._takes(layer, adapter)):
            return with_adapter(layer, self.name, adapter)
        if self._takes(layer, adapter):
            layer.named_adapters()[self.name].take(adapter)
            return layer
        adapted = with_adapter(layer.to_base(), self.name, adapter)
        adapted.base_change = layer.base_change
        return adapted

    def _takes(self, layer: nn.Module, adapter: Adapter) -> bool:
        """Return whether a layer can have an adapter without being replaced."""
        if not isinstance(layer, AdaptedLayer):
            return False
        held = layer.named_adapters()
        return self.beside or (list(held) == [self.name] and held[self.name].fits(adapter))

    def _check_kind(self) -> None:
        """Raise ValueError if the model has adapters of another kind than the file's.

        Whoever wants another kind gives it a name, or a model without adapters.
        """
        for layer in adapted_layers(self.model):
            for name, adapter in layer.named_adapters().items():
                if not isinstance(adapter, self.file.kind):
                    raise ValueError(
                        f"{self.file.folder / CONFIG_NAME}: expected peft_type "
                        f"{adapter.peft_type!r} like the model's adapter {name!r}, got "
                        f"{self.file.kind.peft_type!r}; give it an adapter_name to have both"
                    )

    def _check_left(self) -> None:
        """Raise ValueError if an adapter that has changed its base would be lost."""
        for module, layer in self.layers.items():
            change = layer.base_change if isinstance(layer, AdaptedLayer) else None
            if change is not None and id(layer) not in self.placements and not self.beside:
                raise ValueError(
                    f"{self.file.weights}: expected an adapter of {module}, whose base was "
                    f"{change}, found none"
                )

    def _find_layer(self, module: str) -> tuple[str, nn.Module]:
        """Return the layer of a module of the file, and its name in the model."""
        for name, layer in self.layers.items():
            if file_name(name) == module:
                if layer_base(layer).weight.device.type == "meta":
                    raise ValueError(f"{module}: expected a layer with values, got one on meta")
                return name, layer
        raise ValueError(
            f"{self.file.weights}: expected adapters of linear layers of this model, "
            f"got one of {module!r}, which it does not have"
        )

    def _check_place(
        self, layer: nn.Module, adapter: Adapter, change: BaseChange | None, module: str
    ) -> None:
        """Raise unless an adapter can be put on a layer with its base as it is."""
        file = self.file.folder / CONFIG_NAME
        if isinstance(layer, LinearNF4):
            if change is not None:
                layer.check_whole(f"start an adapter by {change.kind}")
            elif self.beside or not self._takes(layer, adapter):
                check_parts(module, layer, adapter.splits)
        if change is not None and not isinstance(layer, LinearNF4):
            raise ValueError(
                f"{file}: {module}: expected a LinearNF4 for an adapter that started by "
                f"{change.kind}, got {type(layer).__name__}"
            )
        if not isinstance(layer, AdaptedLayer):
            return
        if self.beside and self.name in layer.named_adapters():
            raise ValueError(
                f"{file}: {module}: expected a layer without adapter {self.name!r}, it has one"
            )
        of_layer, of_file = (_form(c) for c in (layer.base_change, change))
        if of_layer != of_file:
            raise ValueError(
                f"{file}: {module}: expected a base {_changed(change)}, on which the adapter of "
                f"the file was trained, got one {_changed(layer.base_change)}"
            )


def _form(change: BaseChange | None) -> tuple[str, int, bool] | None:
    return None if change is None else (change.kind, change.r, change.from_original)


def _changed(change: BaseChange | None) -> str:
    return "as nf4.quantize_model makes it" if change is None else str(change)


def _find_biases(
    model: nn.Module, adapter: AdapterFile, beside: bool
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the parameters that a file's biases go to; layers may change, their biases stay."""
    biases, bias, file = adapter.biases, adapter.bias, adapter.weights
    if beside and bias != "none":
        raise ValueError(f"{file}: expected bias='none' beside other adapters, got {bias!r}")
    if biases and bias == "none":
        raise ValueError(f"{file}: expected no bias with bias='none', got {next(iter(biases))!r}")
    known = {file_name(n): p for n, p in model.named_parameters() if n.endswith("bias")}
    found = []
    for name, value in biases.items():
        parameter = known.get(name.replace(".base_layer.bias", ".bias"))
        if parameter is None or parameter.shape != value.shape or not value.isfinite().all():
            shape = None if parameter is None else tuple(parameter.shape)
            raise ValueError(
                f"{file}: {name}: expected the bias of a layer of this model, of shape {shape} and "
                f"finite, got {tuple(value.shape)}"
            )
        found.append((parameter, value))
    return found
