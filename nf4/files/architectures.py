"""Which tensors of a folder are which layers' weights: frameworks know the models, files ask them.

A module of nf4/integrations/ registers what it knows when it is imported, which happens as soon as
its framework is: nothing here knows one but by the name of the module that brings it.
"""

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nf4.tools.install import from_checkout
from nf4.tools.shards import Shards

_FRAMEWORK = "transformers.modeling_utils"


@dataclass(frozen=True)
class Found:
    """A tensor that is a weight of a linear layer.

    Attributes:
        tensor: its name in the files.
        layer: the name of the layer.
        turned: whether it is held ``[in_features, out_features]``, as that of a Conv1D.
    """

    tensor: str
    layer: str
    turned: bool


@dataclass(frozen=True)
class Plan:
    """What is to be done with a folder's tensors.

    Attributes:
        layers: names in the files of the weights to quantize, and whether each is a Conv1D's.
        config: for ``quantization_config`` of the folder's ``config.json``.
    """

    layers: dict[str, bool]
    config: dict[str, Any]


@dataclass(frozen=True)
class StoredLayer:
    """A weight in four bits in a folder's files, or all experts' weights of one kind.

    Attributes:
        kind: "linear", "embedding" or "experts".
        names: in the files, without their parts; of experts one each.
        becomes: the name in the files of the dense weight.
        shape: of one weight ``[N, K]``.
        block_size: elements that share one scale.
    """

    kind: str
    names: tuple[str, ...]
    becomes: str
    shape: tuple[int, ...]
    block_size: int


@dataclass(frozen=True)
class Place:
    """Where the weight of a linear layer lies in a folder's files, were all of them dense.

    Attributes:
        layer: its name in the model.
        tensor: name in the files of the weight that it has.
        becomes: name of its own weight: another one if it shares that of an embedding.
        shape: of the weight ``[N, K]``.
        turned: whether it is held ``[K, N]``, as that of a Conv1D.
        number: of an expert whose weight is a part of the tensor; None of all else.
    """

    layer: str
    tensor: str
    becomes: str
    shape: tuple[int, ...]
    turned: bool
    number: int | None


@dataclass(frozen=True)
class Layout:
    """How a model and the tensors of a folder belong together.

    Attributes:
        places: by every name that the model has for a linear layer.
        biases: tensors in the files by the names of parameters.
        ties: parameters by those that the model ties to them.
        wide: tensors that the model keeps in fp32.
    """

    places: dict[str, Place]
    biases: dict[str, str]
    ties: dict[str, str]
    wide: frozenset[str]


class Architectures(Protocol):
    """What a framework knows of the models in folders."""

    def find(
        self, folder: Path, tensors: Iterable[str], skip_modules: str | Iterable[str]
    ) -> list[Found] | None:
        """Return the weights that `nf4.quantize_model` would quantize; None of an unknown class."""

    def make_plan(
        self,
        folder: Path,
        skip_modules: str | Iterable[str] | None,
        options: dict[str, Any],
        shards: Shards,
    ) -> Plan:
        """Return what is to be quantized of a folder, all checked."""

    def stored_layers(
        self, folder: Path, shards: Shards, said: Mapping[str, Any]
    ) -> tuple[list[StoredLayer], list[str]]:
        """Return the 4-bit weights of a folder, and the names of linear layers that are dense."""

    def layout(
        self, shards: Shards, stored: Sequence[StoredLayer], names: Iterable[str], dtype: str
    ) -> Layout:
        """Return how a folder's model and its tensors belong together."""


KNOWN: list[Architectures] = []


def architectures() -> Architectures:
    """Return what the installed framework knows.

    Raises:
        ImportError: there is none.
    """
    if not KNOWN:
        try:
            importlib.import_module(_FRAMEWORK)  # which brings its integration
        except ImportError as error:
            raise ImportError(
                f"expected transformers to know the model's layers, {error}: {from_checkout('hf')}"
            ) from error
    if not KNOWN:
        raise ImportError(f"expected a transformers that nf4 knows: {from_checkout('hf')}")
    return KNOWN[0]


def are_known() -> bool:
    """Return whether a framework is installed that knows models."""
    return bool(KNOWN) or importlib.util.find_spec("transformers") is not None
