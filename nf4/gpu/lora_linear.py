"""Multiply by a quantized weight plus a low-rank update on a GPU, forward and backward.

    few rows     t = x @ A.T in one pass, then one kernel: x @ W.T + s * t @ B.T + bias
    many rows    W + s * B @ A dequantized into scratch, rounded once, then one library product
    many rows, with dropout or W in rows
                 what the adapter adds, then the library's product on top of it

Backward makes u = s * dy @ B, dB and the gradient of bias in one pass over dy, dA in one over x.
Nothing is computed twice; the dropout mask is made again from its seed.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as library_linear

from nf4.gpu.linear import KERNELS, dense_scratch, shared_dense
from nf4.gpu.plan import choose
from nf4.gpu.sequence import Results, repeated
from nf4.kernels._launch import spoil
from nf4.kernels.dequantize import dequantize
from nf4.kernels.dequantize_merge import dequantize_merge
from nf4.kernels.lora_down import lora_down
from nf4.kernels.lora_grad import lora_grad, max_rank
from nf4.kernels.lora_up import lora_up
from nf4.reference.linear import accumulator
from nf4.reference.lora_linear import Gradients, add_lora, add_lora_backward
from nf4.tensor import Weight
from nf4.tools import scratch
from nf4.tools.rows import as_rows, unflattened
from nf4.tools.terms import NO_DROPOUT, Dropout, Epilogue, LowRank

# H200, W 14336×4096, merging: 47 µs with A and B of rank 16 in fp32, 46 in bf16; of 64, 74 and 57
MOST_RANK_ROUNDED_BY_KERNELS = 16


def _rounded(low_rank: LowRank, dtype: torch.dtype) -> LowRank:
    """Return A and B as kernels read them: of larger ranks rounded already, half of the bytes."""
    spoil()
    lora_A, lora_B, scaling, dropout = low_rank
    if lora_A.shape[0] > MOST_RANK_ROUNDED_BY_KERNELS:
        lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    return LowRank(lora_A.contiguous(), lora_B.contiguous(), scaling, dropout)


def lora_linear(
    x: Tensor, weight: Weight, low_rank: LowRank, bias: Tensor | None, need_t: bool
) -> tuple[Tensor, Tensor | None]:
    """Return y and t; arguments as in nf4/reference/lora_linear.py."""
    x, weight = x.contiguous(), weight.contiguous()
    m = math.prod(x.shape[:-1])
    bias = None if bias is None else bias.contiguous()
    how = choose("lora_linear", m, weight, x.dtype, low_rank).how
    if how == "dequantize_merge":
        low_rank = _rounded(low_rank, x.dtype)

        def launch() -> Results:
            down = lora_down(x, low_rank.lora_A, NO_DROPOUT) if need_t else None
            return _merged(weight, low_rank, x.dtype), down

        key = (m, need_t, _form(x.dtype, weight, low_rank))
        merged, down = repeated(key, (x, *weight[:4], *low_rank[:2]), launch)
        assert merged is not None
        if bias is None:
            return library_linear(x, merged), down
        # With a bias the library returns a view, which autograd would not let be written to
        return unflattened(library_linear(as_rows(x), merged, bias.to(x.dtype)), x), down
    given, x = x, as_rows(x)
    if how == "unfused":
        acc = accumulator(x.dtype)
        w = dequantize(weight, x.dtype, dense_scratch(weight, x.dtype))
        y = x.to(acc) @ w.to(acc).T
        y, t = add_lora(y, x, low_rank, bias)
        return unflattened(y, given), t
    if how in KERNELS:  # which round what they read; a copy would be more than a launch
        lora_A, lora_B = low_rank.lora_A.contiguous(), low_rank.lora_B.contiguous()
    else:
        lora_A, lora_B = _rounded(low_rank, x.dtype)[:2]
    own = None
    if not need_t:
        own = scratch.matrix(f"t, {x.dtype}", (m, lora_A.shape[0]), x.dtype, x.device)
    t, scaling = lora_down(x, lora_A, low_rank.dropout, own), low_rank.scaling
    if how in KERNELS:
        y = KERNELS[how](x, weight, Epilogue(bias, t, lora_B, scaling))
    else:
        w = dequantize(weight, x.dtype, dense_scratch(weight, x.dtype))
        y = lora_up(t, lora_B.T, scaling, bias, NO_DROPOUT).addmm_(x, w.T)
    return unflattened(y, given), t if need_t else None


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    weight: Weight,
    low_rank: LowRank,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients of x, bias, lora_A and lora_B; as in nf4/reference/lora_linear.py."""
    like, dy, weight = dy, dy.contiguous(), weight.contiguous()
    m = math.prod(dy.shape[:-1])
    how = choose("lora_linear_backward", m, weight, dy.dtype, low_rank).how
    merges = how == "dequantize_merge"
    if not merges:
        dy, x = as_rows(dy), None if x is None else as_rows(x)
    if how == "unfused":
        dx = None
        if needs[0]:
            acc = accumulator(dy.dtype)
            w = dequantize(weight, dy.dtype, dense_scratch(weight, dy.dtype))
            dx = dy.to(acc) @ w.to(acc)
        dx, dbias, dA, dB = add_lora_backward(dx, dy, x, t, low_rank, needs)
        return None if dx is None else unflattened(dx, like), dbias, dA, dB
    low_rank, x = _rounded(low_rank, dy.dtype), None if x is None else x.contiguous()
    if merges and needs[0]:

        def launch() -> Results:
            passes = _passes(dy, x, t, low_rank, x is not None, needs[1])
            return _merged(weight, low_rank, dy.dtype), *passes

        key = (m, needs[1], x is None, t is None, _form(dy.dtype, weight, low_rank))
        given = (dy, x, t, *weight[:4], *low_rank[:2])
        # What the kernels do in one pass; of other ranks, and without t, PyTorch does a part
        whole = low_rank.lora_A.shape[0] <= max_rank(dy.device)
        whole = whole and (t is not None or (x is None and not needs[1]))
        merged, _, dbias, dA, dB = repeated(key, given, launch) if whole else launch()
        assert merged is not None
        return dy @ merged, dbias, dA, dB
    u, dbias, dA, dB = _passes(dy, x, t, low_rank, x is not None or needs[0], needs[1])
    dx = None
    if needs[0] and u is not None:
        w = dequantize(weight, dy.dtype, dense_scratch(weight, dy.dtype))
        up = lora_up(u, low_rank.lora_A, 1.0, None, low_rank.dropout)
        dx = unflattened(up.addmm_(dy, w), like)
    return dx, dbias, dA, dB


def _form(dtype: torch.dtype, weight: Weight, low_rank: LowRank) -> tuple[Any, ...]:
    """Return what launches of a merged product depend on beside rows of x and what is wanted."""
    (n, k), double_quant, lora_A = weight.shape, weight.absmax2 is not None, low_rank.lora_A
    of_adapter = (lora_A.shape[0], lora_A.dtype, low_rank.lora_B.dtype, low_rank.scaling)
    return dtype, n, k, weight.block_size, double_quant, *of_adapter


def _merged(weight: Weight, low_rank: LowRank, dtype: torch.dtype) -> Tensor:
    """Return W with the update merged in, in scratch memory."""
    return dequantize_merge(weight, low_rank, dtype, shared_dense(weight, dtype))


def _passes(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    low_rank: LowRank,
    need_u: bool,
    need_sums: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return u, dbias, dA and dB: one pass over dy, one over x."""
    lora_A, lora_B, scaling, dropout = low_rank
    u = dbias = dA = dB = None
    if t is not None and lora_A.shape[0] <= max_rank(dy.device):
        wanted = lora_B if need_u else None
        dB, u, dbias = lora_grad(dy, t, wanted, scaling, need_sums, NO_DROPOUT)
    elif t is not None:
        dB = _strips(dy, t, scaling, NO_DROPOUT).T.contiguous()
    if need_sums and dbias is None:
        spoil()
        dbias = as_rows(dy).sum(dim=0, dtype=torch.float32)
    if need_u and u is None:
        spoil()
        u = (as_rows(dy) @ lora_B.to(dy.dtype)).mul_(scaling)
    if x is not None and u is not None:
        dA = _strips(x, u, 1.0, dropout)
    return u, dbias, dA, dB


def _strips(z: Tensor, v: Tensor, scaling: float, dropout: Dropout) -> Tensor:
    """Return scaling * v.T @ drop(z) / (1 - p) in fp32, a pass over z for each strip of v."""
    step = max_rank(z.device)
    strips = [v]
    if v.shape[1] > step:
        spoil()
        strips = [v[:, i : i + step].contiguous() for i in range(0, v.shape[1], step)]
    parts = [lora_grad(z, part, None, scaling, False, dropout, True)[0] for part in strips]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
