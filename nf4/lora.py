"""Low-rank adapters as computation: what they add to a quantized layer's output, or to its weight.

LoRA: y = x W^T + s dropout(x) A^T B^T. DoRA scales each row of W + s B A to a learned length m:
y = (m / |W + s B A|) (x W^T + s dropout(x) A^T B^T), the length |.| taken as a constant.
Sources: LoRA (https://arxiv.org/abs/2106.09685); DoRA (https://arxiv.org/abs/2402.09353,
section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.functional import linear as dense_linear

from nf4.functional import dequantize_rows, linear, lora_linear
from nf4.operators import WEIGHT, call, define
from nf4.tensor import NF4Tensor

_ROWS = 256  # of W that are dense at a time


@dataclass(frozen=True, eq=False)
class LowRank:
    """One adapter of a layer.

    Attributes:
        lora_A: floating ``[r, K]``.
        lora_B: floating ``[N, r]``.
        scaling: s.
        dropout_p: probability of dropping an element of the adapter's input.
        magnitude: floating ``[N]``, the length of each row of the weight, for DoRA.
        bias: floating ``[N]``, what is added to the adapter's output before scaling.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float = 0.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None


def adapted_linear(
    x: Tensor, q: NF4Tensor, bias: Tensor | None, adapters: Sequence[LowRank]
) -> Tensor:
    """Return x @ W.T + bias plus what each adapter adds, ``[..., N]`` in the dtype of x.

    Adapters are applied in turn. DoRA without dropout scales what the ones before it have made of
    the weight, as PEFT's does; with dropout, the weight alone. A plain LoRA adapter that comes
    first is computed with its base in one call of `nf4.lora_linear`.

    Args:
        x: floating ``[..., K]``.
        q: quantized W ``[N, K]``.
        bias: floating ``[N]`` or None.
        adapters: any number.
    """
    rest = list(adapters)
    if rest and rest[0].magnitude is None and rest[0].bias is None:
        first, rest = rest[0], rest[1:]
        low = (first.lora_A, first.lora_B, first.scaling)
        y = lora_linear(x, q, *low, bias, first.dropout_p)
    else:
        y = linear(x, q, bias)
    for adapter in rest:
        y = y + _update(x, q, bias, adapter, y)
    return y


def mixed_linear(
    x: Tensor, q: NF4Tensor, bias: Tensor | None, adapters: Sequence[LowRank | None]
) -> Tensor:
    """Return the output of a batch whose samples have an adapter each, or none.

    Args:
        x: floating ``[samples, ..., K]``.
        q: quantized W ``[N, K]``.
        bias: floating ``[N]`` or None.
        adapters: one entry a sample.

    Raises:
        ValueError: the number of adapters is not that of samples.
    """
    if len(adapters) != len(x):
        raise ValueError(f"expected one adapter for each of {len(x)} samples, got {len(adapters)}")
    y = base = linear(x, q, bias)
    for adapter in {id(a): a for a in adapters if a is not None}.values():
        of_adapter = [i for i, wanted in enumerate(adapters) if wanted is adapter]
        rows = torch.tensor(of_adapter, device=x.device)
        y = y.index_add(0, rows, _update(x[rows], q, bias, adapter, base[rows]))
    return y


def _update(x: Tensor, q: NF4Tensor, bias: Tensor | None, adapter: LowRank, y: Tensor) -> Tensor:
    """Return what an adapter adds to an output y, in the dtype of y."""
    a, b = adapter.lora_A.to(y.dtype), adapter.lora_B.to(y.dtype)
    dropped = dropout(x, adapter.dropout_p)
    update = dense_linear(dense_linear(dropped.to(y.dtype), a), b) * adapter.scaling
    if adapter.magnitude is not None:
        if adapter.dropout_p:
            base = linear(dropped, q)
        else:
            base = y if bias is None else y - bias.to(y.dtype)
        # In fp32 until a little beside 1 is a number of its own
        ratio = adapter.magnitude.float() / weight_norm(q, adapter)
        update = (ratio - 1).to(y.dtype) * base + ratio.to(y.dtype) * update
    if adapter.bias is not None:
        update = update + (adapter.bias * adapter.scaling).to(y.dtype)
    return update.to(y.dtype)


@torch.no_grad()
def weight_norm(q: NF4Tensor, adapter: LowRank | None = None) -> Tensor:
    """Return the length of each row of W + s B A, without making that sum.

    |w + s b A|^2 = |w|^2 + 2 s b.(A w) + s^2 b (A A^T) b for a row w of W and b of B.

    Args:
        q: quantized W ``[N, K]``.
        adapter: none for the rows of W alone.

    Returns:
        float32 ``[N]``.
    """
    low: tuple[Tensor | None, ...] = (None, None)
    if adapter is not None:
        low = (adapter.lora_A.detach(), adapter.lora_B.detach())
    scaling = 0.0 if adapter is None else float(adapter.scaling)
    parts = [None if part is None else part.detach() for part in q.parts()]
    norm: Tensor = call("weight_norm", *parts, *low, scaling, *q.shape, q.block_size, q.layout)
    return norm


def _weight_norm(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    n: int,
    k: int,
    block_size: int,
    layout: str,
) -> Tensor:
    shape = torch.Size((n, k))
    q = NF4Tensor(packed, absmax, shape, torch.float32, block_size, absmax2, offset, layout)
    a = None if lora_A is None else lora_A.float()
    b = None if lora_B is None else lora_B.float()
    squares = torch.empty(n, dtype=torch.float32, device=packed.device)
    for rows, w in dequantize_rows(q, _ROWS, torch.float32):
        squares[rows] = w.square().sum(dim=1)
        if a is not None and b is not None:
            squares[rows] += 2 * scaling * ((w @ a.T) * b[rows]).sum(dim=1)
    if a is not None and b is not None:
        squares += scaling * scaling * ((b @ (a @ a.T)) * b).sum(dim=1)
    return squares.clamp_min_(0).sqrt_()


def _weight_norm_fake(packed: Tensor, *args: Any) -> Tensor:
    *_, n, _, _, _ = args
    return packed.new_empty(n, dtype=torch.float32)


define(
    "weight_norm",
    f"({WEIGHT}, Tensor? lora_A, Tensor? lora_B, float scaling, SymInt n, SymInt k, int block_size,"
    " str layout) -> Tensor",
    _weight_norm,
    _weight_norm_fake,
)


@torch.no_grad()
def fold(w: Tensor, q: NF4Tensor, adapters: Sequence[LowRank]) -> Tensor:
    """Return W with adapters folded in.

    Args:
        w: float32 ``[N, K]``, what q dequantizes to; overwritten.
        q: quantized W.
        adapters: in the order in which they are folded in.

    Returns:
        float32 ``[N, K]``.

    Raises:
        ValueError: an adapter has a bias.
    """
    for adapter in adapters:
        if adapter.bias is not None:
            raise ValueError("expected adapters without a bias to merge, got one with lora_bias")
        w = w.addmm_(adapter.lora_B.float(), adapter.lora_A.float(), alpha=adapter.scaling)
        if adapter.magnitude is not None:
            w = w.mul_((adapter.magnitude.float() / weight_norm(q, adapter))[:, None])
    return w
