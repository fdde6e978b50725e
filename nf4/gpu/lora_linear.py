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

import torch
from torch import Tensor
from torch.nn.functional import linear as library_linear

from nf4.gpu.linear import KERNELS, contiguous, dense_scratch, dense_weight
from nf4.gpu.plan import has_matrix_kernels, plan
from nf4.kernels._launch import spoil
from nf4.kernels.dequantize_merge import dequantize_merge
from nf4.kernels.lora_down import lora_down
from nf4.kernels.lora_grad import lora_grad, max_rank
from nf4.kernels.lora_up import lora_up
from nf4.reference.linear import accumulator
from nf4.reference.lora_linear import add_lora, add_lora_backward
from nf4.tools import scratch
from nf4.tools.rows import as_rows, unflattened

MAX_RANK = 256
# H200, W 14336×4096, merging: 47 µs with A and B of rank 16 in fp32, 46 in bf16; of 64, 74 and 57
MOST_RANK_ROUNDED_BY_KERNELS = 16
# What the fused kernels take: they divide their sums by it, and multiply later
LEAST_SCALING, GREATEST_SCALING = 2.0**-100, 2.0**100


def _fits(x: Tensor, k: int, r: int, seed: Tensor | None) -> bool:
    """Return whether the adapter's kernels take these sizes; dropout goes by groups of eight."""
    if x.dtype not in (torch.float16, torch.bfloat16) or not has_matrix_kernels(x.device):
        return False
    return r <= MAX_RANK and (seed is None or k % 8 == 0)


def _factors(lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A and B as kernels read them: of larger ranks rounded already, half of the bytes."""
    spoil()
    if lora_A.shape[0] > MOST_RANK_ROUNDED_BY_KERNELS:
        lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    return lora_A.contiguous(), lora_B.contiguous()


def lora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_t: bool,
    block_size: int,
    layout: str = "rows",
) -> tuple[Tensor, Tensor]:
    """Return y and t; arguments as in nf4/reference/lora_linear.py."""
    x = x.contiguous()
    k, (n, r) = x.shape[-1], lora_B.shape
    m = math.prod(x.shape[:-1])
    weight = contiguous(packed, absmax, absmax2, offset)
    bias = None if bias is None else bias.contiguous()
    kernel = plan(m, n, k, x.dtype, layout, block_size, absmax2 is not None, x.device).kernel
    fits = _fits(x, k, r, seed)
    if fits and kernel == "dequantize" and layout == "fragments" and seed is None:
        lora_A, lora_B = _factors(lora_A, lora_B, x.dtype)
        t = lora_down(x, lora_A, 0.0, None) if need_t else x.new_empty(0)
        w = dense_scratch((n, k), x.dtype, x.device)
        dequantize_merge(*weight, lora_A, lora_B, scaling, block_size, x.dtype, w)
        if bias is None:
            return library_linear(x, w), t
        # With a bias the library returns a view, which autograd would not let be written to
        return unflattened(library_linear(as_rows(x), w, bias.to(x.dtype)), x), t
    given, x = x, as_rows(x)
    if not fits:
        acc = accumulator(x.dtype)
        w = dense_weight(*weight, (n, k), block_size, layout, x.dtype)
        y = x.to(acc) @ w.to(acc).T
        y, t = add_lora(y, x, bias, lora_A, lora_B, scaling, dropout_p, seed)
        return unflattened(y, given), t
    if kernel in KERNELS:  # which round what they read; a copy would be more than a launch
        lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    else:
        lora_A, lora_B = _factors(lora_A, lora_B, x.dtype)
    own = None if need_t else scratch.matrix(f"t, {x.dtype}", (m, r), x.dtype, x.device)
    t = lora_down(x, lora_A, dropout_p, seed, own)
    if kernel in KERNELS and LEAST_SCALING <= abs(scaling) <= GREATEST_SCALING:
        y = KERNELS[kernel](x, *weight, bias, t, lora_B, scaling, n, block_size)
    else:
        w = dense_weight(*weight, (n, k), block_size, layout, x.dtype)
        y = lora_up(t, lora_B.T, scaling, bias, 0.0, None).addmm_(x, w.T)
    return unflattened(y, given), t


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    block_size: int,
    needs: Sequence[bool],
    layout: str = "rows",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, bias, lora_A and lora_B; as in nf4/reference/lora_linear.py."""
    given, dy = dy, dy.contiguous()
    (n, r), k = lora_B.shape, lora_A.shape[1]
    weight = contiguous(packed, absmax, absmax2, offset)
    fits, merges = _fits(dy, k, r, seed), layout == "fragments" and seed is None
    if not (fits and merges):
        dy, x = as_rows(dy), None if x is None else as_rows(x)
    if not fits:
        dx = None
        if needs[0]:
            acc = accumulator(dy.dtype)
            w = dense_weight(*weight, (n, k), block_size, layout, dy.dtype)
            dx = dy.to(acc) @ w.to(acc)
        terms = (lora_A, lora_B, scaling, dropout_p, seed)
        dx, dbias, dA, dB = add_lora_backward(dx, dy, x, t, *terms, needs)
        return None if dx is None else unflattened(dx, given), dbias, dA, dB
    lora_A, lora_B = _factors(lora_A, lora_B, dy.dtype)
    need_u = x is not None or (needs[0] and not merges)
    u = dbias = dA = dB = None
    if t is not None and r <= max_rank(dy.device):
        wanted = lora_B if need_u else None
        dB, u, dbias = lora_grad(dy, t, wanted, scaling, needs[1], 0.0, None)
    elif t is not None:
        dB = _strips(dy, t, scaling, 0.0, None).T.contiguous()
    if needs[1] and dbias is None:
        dbias = as_rows(dy).sum(dim=0, dtype=torch.float32)
    if need_u and u is None:
        u = (as_rows(dy) @ lora_B.to(dy.dtype)).mul_(scaling)
    if x is not None and u is not None:
        dA = _strips(x.contiguous(), u, 1.0, dropout_p, seed)
    dx = None
    if needs[0] and merges:
        w = dense_scratch((n, k), dy.dtype, dy.device)
        dx = dy @ dequantize_merge(*weight, lora_A, lora_B, scaling, block_size, dy.dtype, w)
    elif needs[0] and u is not None:
        w = dense_weight(*weight, (n, k), block_size, layout, dy.dtype)
        dx = unflattened(lora_up(u, lora_A, 1.0, None, dropout_p, seed).addmm_(dy, w), given)
    return dx, dbias, dA, dB


def _strips(z: Tensor, v: Tensor, scaling: float, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Return scaling * v.T @ drop(z) / (1 - p) in fp32, a pass over z for each strip of v."""
    step = max_rank(z.device)
    strips = [v]
    if v.shape[1] > step:
        strips = [v[:, i : i + step].contiguous() for i in range(0, v.shape[1], step)]
    parts = [lora_grad(z, part, None, scaling, False, dropout_p, seed, True)[0] for part in strips]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
