"""What every kind of adapter is: a term over a linear layer's product, parameters, a form in files.

A layer computes x W^T + bias. An adapter makes of this product another one, and the next adapter
another one of that: each `Term` gets its input x and what is beneath it as a function. Folded into
a weight, terms are applied in the same order. A new kind is one file with a term and a subclass of
`Adapter`, such as nf4/models/kinds/ia3.py; layers, files, choice and merging know it by these.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear

from nf4.functional import dequantize, multiply
from nf4.ops.replay import Replays
from nf4.tensor import NF4Tensor

Below = Callable[[Tensor], Tensor]
# What a weight is, and the bias beside it
Folded = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Base:
    """A layer's product without adapters; called with x, it returns x @ W.T + bias.

    Attributes:
        weight: W ``[N, K]``, in four bits or dense.
        bias: floating ``[N]`` or None.
        replays: what a layer remembers of products with its weight.
    """

    weight: NF4Tensor | Tensor
    bias: Tensor | None = None
    replays: Replays = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias, ``[..., N]`` in the dtype of x."""
        if isinstance(self.weight, NF4Tensor):
            return multiply(x, self.weight, self.bias, self.replays)
        return dense_linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        """Return W as a new tensor ``[N, K]``, float32, or float64 if it is dense and that."""
        if isinstance(self.weight, NF4Tensor):
            return dequantize(self.weight, torch.float32)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.detach().to(wide, copy=True)


class Term(Protocol):
    """What an adapter computes, with its parameters as they are at one call."""

    @abstractmethod
    def apply(self, x: Tensor, below: Below, base: Base) -> Tensor:
        """Return the layer's output with this term on it.

        Args:
            x: floating ``[..., K]``.
            below: what is computed of an input without this term; base itself if nothing else is
                between them.
            base: the product at the bottom.

        Returns:
            ``[..., N]`` in the dtype of what below returns.
        """

    @abstractmethod
    def fold(self, w: Tensor, bias: Tensor | None, base: Base) -> Folded:
        """Return weight and bias with this term folded in.

        Args:
            w: float32 or float64 ``[N, K]``, with the terms beneath folded in; may be overwritten.
            bias: floating ``[N]`` or None; not to be overwritten.
            base: the product at the bottom.

        Raises:
            ValueError: the term has no place in a linear layer.
        """


def compute(x: Tensor, base: Base, terms: Sequence[Term], below: Below | None = None) -> Tensor:
    """Return the output of a layer with terms on it, the last one outermost.

    Args:
        x: floating ``[..., K]``.
        base: the layer's product.
        terms: in turn.
        below: what computes the layer without terms, where more is done than the product.
    """
    below = base if below is None else below
    for term in terms:
        below = _over(term, below, base)
    return below(x)


def _over(term: Term, below: Below, base: Base) -> Below:
    return lambda x: term.apply(x, below, base)


def compute_mixed(
    x: Tensor, base: Base, terms: Sequence[Term | None], below: Below | None = None
) -> Tensor:
    """Return the output of a batch whose samples have a term each, or none.

    Args:
        x: floating ``[samples, ..., K]``.
        base: the product beneath.
        terms: one entry a sample.
        below: as for `compute`.

    Raises:
        ValueError: the number of terms is not that of samples.
    """
    if len(terms) != len(x):
        raise ValueError(f"expected one adapter for each of {len(x)} samples, got {len(terms)}")
    below = base if below is None else below
    y = known = below(x)
    for term in {id(t): t for t in terms if t is not None}.values():
        of_term = [i for i, wanted in enumerate(terms) if wanted is term]
        rows = torch.tensor(of_term, device=x.device)
        part = x[rows]
        y = y.index_copy(0, rows, term.apply(part, _known(part, known[rows], below), base))
    return y


def _known(x: Tensor, y: Tensor, below: Below) -> Below:
    """Return a function that knows its value for x."""
    return lambda wanted: y if wanted is x else below(wanted)


@torch.no_grad()
def fold(base: Base, terms: Sequence[Term]) -> Folded:
    """Return the wide weight ``[N, K]`` and the bias of a layer with terms folded in, in turn.

    Raises:
        ValueError: a term has no place in a linear layer.
    """
    w, bias = base.dense(), base.bias
    for term in terms:
        w, bias = term.fold(w, bias, base)
    return w, bias


class Adapter(nn.Module):
    """The trainable parameters of one adapter on one layer.

    A kind is a subclass. `peft_type` is its name in files, by which they are read again; `parts`
    are the ends of its tensors' names there, with the number of dimensions each must have, and
    `aliases` other ends of some, under which transformers finds them; `trains_biases` says whether
    a config may let a model's biases train beside it.
    """

    peft_type: ClassVar[str] = ""
    parts: ClassVar[Mapping[str, int]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    trains_biases: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Let files name the kind."""
        super().__init_subclass__(**options)
        if "peft_type" not in vars(cls):
            return
        known = KINDS.setdefault(cls.peft_type, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"peft_type: expected one that no kind has, got {cls.peft_type!r}, "
                f"that of {known.__module__}.{known.__qualname__}"
            )
        KINDS[cls.peft_type] = cls  # a class that was defined again

    @abstractmethod
    def term(self) -> Term:
        """Return what the adapter computes now, in training or not."""

    def merged_term(self) -> Term:
        """Return what is folded into a weight, whether the adapter is in training or not."""
        return self.term()

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved, by the ends of the names in files: those of `parts`."""

    @classmethod
    @abstractmethod
    def config_of(cls, layers: Mapping[str, Self]) -> dict[str, Any]:
        """Return what is said in a file's config of adapters beside where they are.

        Args:
            layers: adapters of this kind, by names of layers as in files.

        Raises:
            ValueError: one config cannot describe them all.
        """

    @classmethod
    @abstractmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError unless a file's config asks for what this kind computes."""

    @classmethod
    @abstractmethod
    def from_file(
        cls, base: Base, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
    ) -> Self:
        """Return the adapter of one layer, new.

        Args:
            base: the layer's product.
            config: of the file, checked.
            name: of the layer, as in files.
            tensors: by the ends of their names; floating, finite, of as many dimensions as `parts`
                says.

        Raises:
            TypeError: an option in the config has the wrong type.
            ValueError: the tensors do not fit the layer or the config.
        """

    def summary(self) -> str:
        """Return the adapter's options in words, for messages and ``print(model)``."""
        return ""

    def extra_repr(self) -> str:
        """Describe the adapter in ``print(model)``."""
        return self.summary()

    def fits(self, other: "Adapter") -> bool:
        """Return whether this adapter can take on the values of another."""
        own, new = self.tensors(), other.tensors()
        same = type(other) in type(self).__mro__ and own.keys() == new.keys()
        return same and all(own[part].shape == new[part].shape for part in own)

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor]) -> Self:
        """Take on values, by the ends of their names in files, and return the adapter."""
        for part, tensor in self.tensors().items():
            tensor.copy_(tensors[part])
        return self

    def take(self, other: Self) -> None:
        """Take on the values of another adapter, which fits."""
        self.copy_from(other.tensors())


KINDS: dict[str, type[Adapter]] = {}


def check_plain(
    config: Mapping[str, Any], harmless: frozenset[str], plain: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise ValueError if a file's config sets an option that this version cannot know.

    Args:
        config: of the file.
        harmless: options that may have any value.
        plain: options with the values they may have. All others must be empty, for one may have
            come after this was written.
    """
    for option, value in config.items():
        known = option in COMMON or option in harmless
        if not known and not (value in plain[option] if option in plain else not value):
            kind = config["peft_type"]
            raise ValueError(f"expected a plain {kind} adapter, got {option}={value!r}")


# Options of PEFT's configs that do not change what tensors mean
COMMON = frozenset(
    [
        "task_type",
        "auto_mapping",
        "peft_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "ensure_weight_tying",
    ]
)


def single(layers: Mapping[str, Any], option: str) -> Any:
    """Return the value that all adapters have for an option.

    Raises:
        ValueError: they have several.
    """
    values = {getattr(layer, option) for layer in layers.values()}
    if len(values) > 1:
        raise ValueError(f"{option}: expected one value for all adapters, got {values}")
    return values.pop()
