"""What an adapter's backward takes from one pass over a tall matrix z: z.T @ v, z @ w, column sums.

    z = dy, v = t, w = lora_B     dB = s * dy.T @ t       u = s * dy @ B       dbias = sums
    z = x,  v = u                 dA.T = drop(x).T @ u / (1 - p)

Sums are taken in fp32. Source: LoRA (https://arxiv.org/abs/2106.09685, section 4.1).
"""

from torch import Tensor

from nf4.reference.dropout_mask import drop
from nf4.reference.linear import accumulator
from nf4.tools.terms import Dropout


def lora_grad(
    z: Tensor,
    v: Tensor,
    w: Tensor | None,
    scaling: float,
    need_sums: bool,
    dropout: Dropout,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return scaling * drop(z).T @ v / (1 - p), scaling * z @ w, and the sums of the columns of z.

    Args:
        z: float16 or bfloat16 ``[M, C]``.
        v: dtype of z ``[M, r]``.
        w: floating ``[C, r]``, rounded to the dtype of z; None if z @ w is not wanted.
        scaling: factor of both products.
        need_sums: whether the sums are wanted.
        dropout: of z in z.T @ v; no w and no sums with it.
        transposed: whether the first product is wanted as ``[r, C]``.

    Returns:
        float32 ``[C, r]``, dtype of z ``[M, r]`` or None, float32 ``[C]`` or None.
    """
    acc = accumulator(z.dtype)
    wide = z.to(acc)
    across = scaling * (drop(wide, dropout).T @ v.to(acc)) / (1 - dropout.p)
    along = None if w is None else (scaling * (wide @ w.to(z.dtype).to(acc))).to(z.dtype)
    across = across.T.contiguous() if transposed else across
    return across, along, wide.sum(dim=0) if need_sums else None
