"""Low-rank adapters: what they compute, their parameters, and what PEFT's files say of them.

LoRA: y = x W^T + s dropout(x) A^T B^T. DoRA scales each row of W + s B A to a learned length m:
y = (m / |W + s B A|) (x W^T + s dropout(x) A^T B^T), the length |.| taken as a constant.
Sources: LoRA (https://arxiv.org/abs/2106.09685); DoRA (https://arxiv.org/abs/2402.09353,
section 4); PEFT's files (https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from nf4.adapters.term import (
    Adapter,
    Base,
    Folded,
    Product,
    check_plain,
    low_rank_update,
    single,
)
from nf4.functional import dequantize_rows
from nf4.ops.checks import check_dropout, check_int, check_number
from nf4.ops.products import times_scaling
from nf4.ops.registry import call, define
from nf4.ops.weight import WEIGHT, parts_of
from nf4.tensor import PLAIN, NF4Tensor

_ROWS = 256  # of W that are dense at a time
# Options of PEFT that change what the tensors mean, with the values that do not
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", "lora_only", "all"),
    "use_rslora": (False, True, None),
    "use_dora": (False, True, None),
    # pissa, olora and their like train against a base weight they have changed; see BaseChange
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "pissa"),
}
_HARMLESS = frozenset(
    [
        "r",
        "lora_alpha",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
    ]
)


@dataclass(frozen=True, eq=False)
class LoRATerm:
    """The term of one adapter.

    A plain LoRA adapter right on a 4-bit weight is computed with it by `nf4.lora_linear`. DoRA
    without dropout scales what the terms beneath have made of the weight, as PEFT's does; with
    dropout, the weight alone.

    Attributes:
        lora_A: floating ``[r, K]``.
        lora_B: floating ``[N, r]``.
        scaling: s; PEFT's may be a tensor ``[]``, whose value need not be waited for.
        dropout_p: probability of dropping an element of the adapter's input.
        magnitude: floating ``[N]``, the length of each row of the weight, for DoRA.
        bias: floating ``[N]``, what is added to the adapter's output before scaling.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor
    dropout_p: float = 0.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    def apply(self, x: Tensor, below: Product, base: Base) -> Tensor:
        """Return what is below plus this adapter, in the dtype of what is below."""
        if self.magnitude is None and self.bias is None:
            low = (self.lora_A, self.lora_B, self.scaling)
            return below.low_rank(x, *low, self.dropout_p)
        y = below(x)
        return y + self._update(x, y, base)

    def _update(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Return what the adapter adds to an output y, in the dtype of y."""
        dropped = dropout(x, self.dropout_p)
        update = low_rank_update(dropped, y.dtype, self.lora_A, self.lora_B, self.scaling)
        if self.magnitude is not None:
            if base.weight.device != y.device:
                raise ValueError(
                    f"DoRA: expected the base weight on {y.device}, where its output is, got it on "
                    f"{base.weight.device}: offloaded layers take LoRA without DoRA"
                )
            if self.dropout_p:
                y = replace(base, bias=None)(dropped)
            elif base.bias is not None:
                y = y - base.bias.to(y.dtype)
            # In fp32 until a little beside 1 is a number of its own
            ratio = self.magnitude.float() / weight_norm(base.weight, self)
            update = (ratio - 1).to(y.dtype) * y + ratio.to(y.dtype) * update
        if self.bias is not None:
            update = update + (self.bias * self.scaling).to(y.dtype)
        return update.to(y.dtype)

    def fold(self, w: Tensor, bias: Tensor | None, base: Base) -> Folded:
        """Return W + s B A and the bias; with DoRA rows at their lengths.

        Of the bias DoRA scales what terms beneath have added to the layer's own.
        """
        if self.bias is not None:
            raise ValueError("expected adapters without a bias to merge, got one with lora_bias")
        scaling = float(self.scaling)
        w = w.addmm_(self.lora_B.to(w.dtype), self.lora_A.to(w.dtype), alpha=scaling)
        if self.magnitude is not None:
            ratio = self.magnitude.float() / weight_norm(base.weight, self)
            w = w.mul_(ratio[:, None])
            if bias is not None and bias is not base.bias:
                added = bias if base.bias is None else bias - base.bias
                bias = (bias + (ratio - 1) * added).to(bias.dtype)
        return w, bias


@torch.no_grad()
def weight_norm(weight: NF4Tensor | Tensor, adapter: LoRATerm | None = None) -> Tensor:
    """Return the length of each row of W + s B A, without making that sum.

    |w + s b A|^2 = |w|^2 + 2 s b.(A w) + s^2 b (A A^T) b for a row w of W and b of B.

    Args:
        weight: W ``[N, K]``, in four bits or dense.
        adapter: none for the rows of W alone.

    Returns:
        float32 ``[N]``.
    """
    low: tuple[Tensor | None, Tensor | None] = (None, None)
    scaling = 0.0
    if adapter is not None:
        a, b = adapter.lora_A.detach(), adapter.lora_B.detach()
        if isinstance(adapter.scaling, Tensor):
            low, scaling = (a, times_scaling(b, adapter.scaling.detach())), 1.0
        else:
            low, scaling = (a, b), adapter.scaling
    if not isinstance(weight, NF4Tensor):
        w = weight.detach().float()
        return _lengths(w.square().sum(dim=1), lambda a: w @ a.T, *low, scaling)
    q = weight
    parts = [None if part is None else part.detach() for part in q.parts()]
    norm: Tensor = call("weight_norm", *parts, *low, scaling, *q.shape, q.block_size, q.layout)
    return norm


def _lengths(
    squares: Tensor,
    times: Callable[[Tensor], Tensor],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> Tensor:
    """Return |w + s b A| of each row.

    Args:
        squares: float32 ``[N]``, |w|^2; overwritten.
        times: returns W A^T ``[N, r]`` for A.
        lora_A: floating ``[r, K]``; None for |w|.
        lora_B: floating ``[N, r]``.
        scaling: s.
    """
    if lora_A is not None and lora_B is not None:
        a, b = lora_A.float(), lora_B.float()
        squares += 2 * scaling * (times(a) * b).sum(dim=1)
        squares += scaling * scaling * ((b @ (a @ a.T)) * b).sum(dim=1)
    return squares.clamp_min_(0).sqrt_()


def _weight_norm(a: Any) -> Tensor:
    q = NF4Tensor(a.packed, a.absmax, torch.Size((a.n, a.k)), torch.float32, a.block_size)
    q = q.with_parts(parts_of(a), layout=a.layout)
    wide = None if a.lora_A is None else a.lora_A.float()
    squares = torch.empty(a.n, dtype=torch.float32, device=q.device)
    products = squares.new_empty(a.n, 0 if wide is None else len(wide))
    for rows, w in dequantize_rows(q, _ROWS, torch.float32):
        squares[rows] = w.square().sum(dim=1)
        if wide is not None:
            products[rows] = w @ wide.T
    return _lengths(squares, lambda _: products, a.lora_A, a.lora_B, a.scaling)


def _weight_norm_fake(a: Any) -> Tensor:
    out: Tensor = a.packed.new_empty(a.n, dtype=torch.float32)
    return out


define(
    "weight_norm",
    f"({WEIGHT}, Tensor? lora_A, Tensor? lora_B, float scaling, SymInt n, SymInt k, int block_size,"
    " str layout) -> Tensor",
    _weight_norm_fake,
    compute=_weight_norm,
)


class LoRA(Adapter):
    """The parameters of one adapter: ``lora_A``, ``lora_B`` and, with DoRA, ``lora_magnitude``.

    ``lora_A`` float32 ``[r, in_features]`` starts as PEFT's does and ``lora_B`` float32
    ``[out_features, r]`` at zero; ``lora_magnitude`` float32 ``[out_features]`` at the length of
    each row of the weight.

    Args:
        base: the layer's product.
        r: rank.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an input of the adapter in training.
        use_rslora: divide lora_alpha by sqrt(r), and not by r.
        use_dora: learn the length of each row of the weight.
    """

    peft_type = "LORA"
    trains_biases = True
    parts = {"lora_A.weight": 2, "lora_B.weight": 2, "lora_magnitude_vector": 1}  # noqa: RUF012
    aliases = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}  # noqa: RUF012

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None

    def __init__(
        self,
        base: Base,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        self._set_options(r, lora_alpha, lora_dropout, use_rslora, use_dora)
        (n, k), options = base.weight.shape, {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, k, **options))  # type: ignore[call-overload]
        self.lora_B = nn.Parameter(torch.zeros(n, r, **options))  # type: ignore[call-overload]
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.register_parameter("lora_magnitude", None)
        if use_dora:
            self.lora_magnitude = nn.Parameter(weight_norm(base.weight))

    def _set_options(
        self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, use_dora: bool
    ) -> None:
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora, self.use_dora = use_rslora, use_dora

    @torch.no_grad()
    def start_from(self, base: Base, lora_A: Tensor, lora_B: Tensor) -> None:
        """Set the adapter's values, and the lengths to those of W + s B A."""
        self.lora_A.copy_(lora_A)
        self.lora_B.copy_(lora_B)
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(weight_norm(base.weight, self.term()))

    @property
    def options(self) -> dict[str, Any]:
        """What another adapter like this one is made by."""
        names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
        return {name: getattr(self, name) for name in names}

    @property
    def scaling(self) -> float:
        """Factor of the adapter's output."""
        return lora_scaling(self.r, self.lora_alpha, self.use_rslora)

    @property
    def splits(self) -> bool:
        """Whether it is without DoRA, which wants the length of whole rows."""
        return not self.use_dora

    def term(self) -> LoRATerm:
        """Return what the adapter computes with, dropout only in training."""
        dropout_p = self.lora_dropout if self.training else 0.0
        return LoRATerm(*self.factors(), self.scaling, dropout_p, self.lora_magnitude)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return lora_A and lora_B; this process's parts on a layer that is split."""
        lora_A, lora_B = self.lora_A, self.lora_B
        if type(lora_A) in PLAIN:
            return lora_A, lora_B
        from nf4.adapters.factor_parts import local_factor

        return local_factor(lora_A), local_factor(lora_B)

    def tensors(self) -> dict[str, Tensor]:
        """Return what PEFT's files hold, by the ends of their names."""
        found: dict[str, Tensor | None]
        found = dict(zip(self.parts, (self.lora_A, self.lora_B, self.lora_magnitude), strict=True))
        return {part: tensor for part, tensor in found.items() if tensor is not None}

    def take(self, other: "LoRA") -> None:
        """Take on the options and values of another adapter of the same rank and kind."""
        self._set_options(**other.options)
        super().take(other)

    @classmethod
    def config_of(cls, layers: Mapping[str, "LoRA"]) -> dict[str, Any]:
        """Return PEFT's options; ranks and alphas that differ go into patterns."""
        plain = {o: single(layers, o) for o in ("lora_dropout", "use_rslora", "use_dora")}
        return {
            **plain,
            **by_pattern(layers, "r", "rank_pattern"),
            **by_pattern(layers, "lora_alpha", "alpha_pattern"),
            "init_lora_weights": True,
        }

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError unless a config is of plain LoRA, rsLoRA or DoRA."""
        check_plain(config, _HARMLESS, _PLAIN)
        check_lora_config(config)

    @classmethod
    def from_file(
        cls, base: Base, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
    ) -> "LoRA":
        """Return the adapter of one layer, new, with the values of a file."""
        missing = sorted({"lora_A.weight", "lora_B.weight"} - tensors.keys())
        if missing:
            raise ValueError(f"expected lora_A and lora_B, got no {missing[0]}")
        (n, k), a, b = base.weight.shape, tensors["lora_A.weight"], tensors["lora_B.weight"]
        if (a.shape[1], tuple(b.shape)) != (k, (n, len(a))) or len(a) < 1:
            raise ValueError(
                f"expected lora_A and lora_B of shapes (r, {k}) and ({n}, r) with r ≥ 1, "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        options = options_of(config, name)
        check_lora_options(**options)
        if options["r"] != len(a):
            raise ValueError(f"expected tensors of rank {options['r']}, got {len(a)}")
        magnitude = tensors.get("lora_magnitude_vector")
        if (magnitude is not None) != options["use_dora"]:
            what = "no lora_magnitude_vector" if magnitude is None else "a lora_magnitude_vector"
            raise ValueError(f"expected what use_dora={options['use_dora']} needs, got {what}")
        adapter = cls(base, **options)
        if magnitude is not None and tuple(magnitude.shape) != (n,):
            raise ValueError(
                f"expected lora_magnitude_vector of shape ({n},), got {tuple(magnitude.shape)}"
            )
        return adapter.copy_from(tensors)

    def summary(self) -> str:
        """Return the options."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return the factor of an adapter's output."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_lora_options(
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> None:
    """Raise TypeError or ValueError unless an adapter can be made with these options."""
    for name, value in (("use_rslora", use_rslora), ("use_dora", use_dora)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    check_int(r, "r", 1)
    check_number(lora_alpha, "lora_alpha")
    if lora_alpha <= 0:
        raise ValueError(f"lora_alpha: expected a finite number above 0, got {lora_alpha}")
    check_dropout(lora_dropout, "lora_dropout")


def check_lora_config(config: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless a file's config has usual options of an adapter."""
    r: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    check_lora_options(r, alpha, config.get("lora_dropout", 0.0))


def by_pattern(layers: Mapping[str, Any], option: str, pattern: str) -> dict[str, Any]:
    """Return an option's most frequent value, and PEFT's pattern of the layers with another."""
    values = {name: getattr(layer, option) for name, layer in layers.items()}
    usual = Counter(values.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}
    return {option: usual, pattern: others}


def options_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the options of one layer's adapter in PEFT's config.

    Raises:
        ValueError: a pattern is no regular expression.
    """
    return {
        "r": _value_of(config, "rank_pattern", name, "r"),
        "lora_alpha": _value_of(config, "alpha_pattern", name, "lora_alpha"),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "use_rslora": config.get("use_rslora") or False,
        "use_dora": config.get("use_dora") or False,
    }


def _value_of(config: Mapping[str, Any], option: str, name: str, default: str) -> Any:
    """Return PEFT's value for a module: that of the first pattern that matches its name's end."""
    patterns = config.get(option) or {}
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
    except (AttributeError, re.error) as error:
        raise ValueError(
            f"{option}: expected regular expressions and values, got {patterns!r}: {error}"
        ) from error
    return config[default]
