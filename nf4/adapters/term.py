"""What every kind of adapter is: a term over a linear layer's product, parameters, a form in files.

A layer computes x W^T + bias. An adapter makes of this product another one, and the next adapter
another one of that: each `Term` gets its input x and what is beneath it, a `Product`. Folded into
a weight, terms are applied in the same order. A new kind is one file with a term and a subclass of
`Adapter`, such as nf4/adapters/ia3.py; layers, files, choice and merging know it by these.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.functional import linear as dense_linear

from nf4.functional import dequantize
from nf4.ops.products import multiply, multiply_lora, multiply_scaled
from nf4.ops.replay import Replays
from nf4.tensor import NF4Tensor
from nf4.tools.ranks import copy_whole
from nf4.tools.terms import NO_DROPOUT, Dropout

# What a weight is, and the bias beside it
Folded = tuple[Tensor, Tensor | None]


class Product:
    """What is computed of an input x: a layer's product, or that with terms on it.

    Each way to change a product has a method, generic here: what is fused overrides it.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Return what is computed of x ``[..., K]``: ``[..., N]``."""
        raise NotImplementedError

    def low_rank(
        self,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        dropout_p: float,
    ) -> Tensor:
        """Return it plus scaling * dropout(x) @ lora_A.T @ lora_B.T, in its dtype."""
        y = self(x)
        update = low_rank_update(dropout(x, dropout_p), y.dtype, lora_A, lora_B, scaling)
        return y + update.to(y.dtype)

    def scale_outputs(self, x: Tensor, factor: Tensor) -> Tensor:
        """Return it times a factor ``[N]``, in its dtype; the product is rounded once."""
        y = self(x)
        return (y * factor).to(y.dtype)

    def scale_inputs(self, x: Tensor, factor: Tensor) -> Tensor:
        """Return it of x times a factor ``[K]``, which is rounded to the dtype of x."""
        return self((x * factor).to(x.dtype))


def low_rank_update(
    x: Tensor, dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
) -> Tensor:
    """Return scaling * x @ lora_A.T @ lora_B.T, computed in a dtype.

    Raises:
        ValueError: the factors are on meta and x is not, of which torch would compute garbage.
    """
    if lora_A.is_meta and not x.is_meta:
        raise ValueError(
            f"lora_A: expected device {x.device}, where the input is, got meta: an adapter that is "
            "offloaded without what brings it back; put adapters on before a model is offloaded"
        )
    a, b = lora_A.to(dtype), lora_B.to(dtype)
    return dense_linear(dense_linear(x.to(dtype), a), b) * scaling


@dataclass(frozen=True, eq=False)
class Base(Product):
    """A layer's product without adapters: x @ W.T + bias for a dense W.

    Attributes:
        weight: W ``[N, K]``.
        bias: floating ``[N]`` or None.
    """

    weight: Tensor | NF4Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias, ``[..., N]`` in the dtype of x."""
        return dense_linear(x, self._dense_weight, self.bias)

    @property
    def _dense_weight(self) -> Tensor:
        assert isinstance(self.weight, Tensor)
        return self.weight

    def dense(self) -> Tensor:
        """Return W as a new tensor ``[N, K]``, float32, or float64 if it is dense and that."""
        weight = self._dense_weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.detach().to(wide, copy=True)


@dataclass(frozen=True, eq=False)
class QuantizedBase(Base):
    """The same for a W in four bits, with everything that can be done in one call fused.

    Attributes:
        weight: W ``[N, K]``.
        bias: floating ``[N]`` or None.
        replays: what a layer remembers of products with its weight.
    """

    weight: NF4Tensor
    replays: Replays | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias, ``[..., N]`` in the dtype of x."""
        return multiply(x, self.weight, self.bias, self.replays)

    def low_rank(
        self,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        dropout_p: float,
    ) -> Tensor:
        """Do as `Product.low_rank` with `nf4.lora_linear`."""
        low, drops = (lora_A, lora_B), Dropout(dropout_p) if dropout_p else NO_DROPOUT
        return multiply_lora(x, self.weight, low, scaling, self.bias, drops, self.replays)

    def scale_outputs(self, x: Tensor, factor: Tensor) -> Tensor:
        """Do as `Product.scale_outputs` with `nf4.linear`."""
        return multiply_scaled(x, self.weight, self.bias, output_factor=factor)

    def scale_inputs(self, x: Tensor, factor: Tensor) -> Tensor:
        """Do as `Product.scale_inputs` with `nf4.linear`."""
        return multiply_scaled(x, self.weight, self.bias, input_factor=factor)

    def dense(self) -> Tensor:
        """Return W as a new tensor ``[N, K]``, float32."""
        return dequantize(self.weight, torch.float32)


def base_of(weight: NF4Tensor | Tensor, bias: Tensor | None = None) -> Base:
    """Return the product with a weight, in four bits or dense."""
    if isinstance(weight, NF4Tensor):
        return QuantizedBase(weight, bias)
    return Base(weight, bias)


@dataclass(frozen=True, eq=False)
class Called(Product):
    """What a function computes, such as a layer that does more than its product."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the function does."""
        return self.function(x)


class Term(Protocol):
    """What an adapter computes, with its parameters as they are at one call."""

    @abstractmethod
    def apply(self, x: Tensor, below: Product, base: Base) -> Tensor:
        """Return the layer's output with this term on it.

        Args:
            x: floating ``[..., K]``.
            below: what is computed without this term; base itself if nothing else is between
                them.
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


@dataclass(frozen=True, eq=False)
class _Over(Product):
    """A product with a term on it."""

    term: Term
    below: Product
    base: Base

    def __call__(self, x: Tensor) -> Tensor:
        return self.term.apply(x, self.below, self.base)


def compute(x: Tensor, base: Base, terms: Sequence[Term], below: Product | None = None) -> Tensor:
    """Return the output of a layer with terms on it, the last one outermost.

    Args:
        x: floating ``[..., K]``.
        base: the layer's product.
        terms: in turn.
        below: what computes the layer without terms, where more is done than the product.
    """
    below = base if below is None else below
    for term in terms:
        below = _Over(term, below, base)
    return below(x)


def compute_mixed(
    x: Tensor, base: Base, terms: Sequence[Term | None], below: Product | None = None
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


def _known(x: Tensor, y: Tensor, below: Product) -> Product:
    """Return a product that knows its value for x."""
    return Called(lambda wanted: y if wanted is x else below(wanted))


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

    @property
    def splits(self) -> bool:
        """Whether parts of the adapter on parts of a weight compute parts of what it does."""
        return False

    @abstractmethod
    def term(self) -> Term:
        """Return what the adapter computes now, in training or not."""

    def forward(self) -> Term:
        """Return `term`."""
        return self.term()

    def called(self) -> Term:
        """Return `term`, called as a module where hooks bring its parameters, as offloading's."""
        if self.is_hooked:
            term: Term = self()
            return term
        return self.term()

    @property
    def is_hooked(self) -> bool:
        """Whether calling the adapter does more than its `term`."""
        hooks = self._forward_pre_hooks or self._forward_hooks
        return bool(hooks) or "forward" in self.__dict__

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
            copy_whole(tensor, tensors[part])
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
