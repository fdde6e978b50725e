"""Multiply by a quantized weight plus a low-rank update, slab by slab as in nf4/cpu/linear.py."""

from collections.abc import Sequence

from torch import Tensor

from nf4.cpu.linear import product, product_backward
from nf4.reference.lora_linear import add_lora, add_lora_backward


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
    y = product(x, packed, absmax, absmax2, offset, lora_B.shape[0], block_size, layout)
    return add_lora(y, x, bias, lora_A, lora_B, scaling, dropout_p, seed)


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
    dx = None
    if needs[0]:
        weight = (packed, absmax, absmax2, offset)
        dx = product_backward(dy, *weight, lora_A.shape[1], block_size, layout)
    return add_lora_backward(dx, dy, x, t, lora_A, lora_B, scaling, dropout_p, seed, needs)
