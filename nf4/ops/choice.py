"""Say which code multiplies by a quantized weight, where and why."""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch

from nf4.ops.checks import check_dropout, check_int
from nf4.ops.registry import implementation
from nf4.tensor import NF4Tensor, Weight, check_nf4
from nf4.tools.choice import Choice
from nf4.tools.terms import Dropout, LowRank

_MISSING = {"cpu": "numba", "cuda": "triton"}


def explain(
    shape: Sequence[int],
    q: NF4Tensor,
    dtype: torch.dtype | None = None,
    *,
    r: int = 0,
    dropout_p: float = 0.0,
    backward: bool = False,
) -> Choice:
    """Say what multiplies an input by a quantized weight, why, and how long a model expects.

    Args:
        shape: of x, ``[..., K]``.
        q: quantized W ``[N, K]``; its device and layout decide.
        dtype: of x; that of q by default.
        r: rank of an adapter's update, 0 for none.
        dropout_p: probability of dropping an element of the update's input.
        backward: whether the gradient is meant, of x and of the adapter.

    Returns:
        A `Choice`, the one by which the product goes, which prints as one line: ``kernel``,
        ``reason`` and ``modelled_seconds``, None off a GPU.

    Raises:
        TypeError: q is no NF4Tensor, or dtype no torch.dtype.
        ValueError: shape does not fit q, q is no matrix, or r or dropout_p is out of range.
    """
    check_nf4(q)
    if q.ndim != 2:
        raise ValueError(f"q: expected a quantized matrix [N, K], got shape {tuple(q.shape)}")
    shape, (n, k) = tuple(shape), q.shape
    if not shape or shape[-1] != k:
        raise ValueError(f"shape: expected (..., {k}) for a weight {tuple(q.shape)}, got {shape}")
    dtype = q.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    check_int(r, "r", 0)
    check_dropout(dropout_p, "dropout_p")
    op, low_rank = "linear", None
    if r:
        a, b, seed = (torch.empty(s, device="meta") for s in ((r, k), (n, r), ()))
        low_rank = LowRank(a, b, 1.0, Dropout(dropout_p, seed if dropout_p else None))
        op = "lora_linear"
    op += "_backward" if backward else ""
    return choose(op, math.prod(shape[:-1]), q.as_weight(), dtype, low_rank)


def choose(
    op: str, rows: int, weight: Weight, dtype: torch.dtype, low_rank: LowRank | None = None
) -> Choice:
    """Return what the backend of a weight's device chooses: ``nf4.gpu.plan`` or ``nf4.cpu.plan``.

    Args:
        op: "linear" or "lora_linear", or one of these with "_backward".
        rows: of x.
        weight: W ``[N, K]``.
        dtype: of x.
        low_rank: the update, of a "lora_linear".
    """
    kind = weight.device.type
    function = implementation(op, kind)
    package = function.__module__.rpartition(".")[0]
    if package != "nf4.reference":
        plan: Any = importlib.import_module(f"{package}.plan")
        choice: Choice = plan.choose(op, rows, weight, dtype, low_rank)
        return choice
    missing = _MISSING.get(kind)
    why = f"no kernels for {kind}" if missing is None else f"{missing} is not installed"
    where = f"{function.__module__}.{function.__name__}"
    return Choice("reference", f"{why}: the reference, in plain PyTorch", None, where)


def wants_fragments(shape: torch.Size, block_size: int, device: torch.device) -> bool:
    """Return whether layers on a device hold a weight of this shape in fragments."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    from nf4.gpu import plan

    return plan.wants_fragments(shape, block_size, device)
