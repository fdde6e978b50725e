"""Multiply by a weight in fragments: y = f * (x @ W.T + scaling * t @ lora_B.T + bias).

W is dequantized to the dtype of x, as nf4/reference/dequantize.py does. Sums are taken in fp32, y
is rounded once.
Sources: QLoRA, section 3 (https://arxiv.org/abs/2305.14314); LoRA (https://arxiv.org/abs/2106.09685).
"""

from torch import Tensor

from nf4.reference.dequantize import dequantize


def matmul(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    t: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    out_features: int,
    block_size: int,
    factor: Tensor | None = None,
) -> Tensor:
    """Return y.

    Args:
        x: float16 or bfloat16 ``[M, K]``.
        packed: uint8 ``[N, K / 2]`` in fragments, see `repack`.
        absmax: float32 ``[N * K / block_size]``, or its uint8 codes, in fragments.
        absmax2: float32 ``[ceil(blocks / 256)]``; None without double quantization.
        offset: float32 ``[]``; None without double quantization.
        bias: floating ``[N]`` or None.
        t: dtype of x ``[M, r]``, x @ lora_A.T; None for no low-rank term.
        lora_B: floating ``[N, r]``, rounded to the dtype of x; None with t.
        scaling: factor of the low-rank term, not 0.
        out_features: N.
        block_size: elements that share one absmax.
        factor: floating ``[N]``, of each output, or None.

    Returns:
        dtype of x ``[M, N]``.
    """
    shape = (out_features, x.shape[1])
    w = dequantize(packed, absmax, absmax2, offset, shape, block_size, x.dtype, "fragments")
    y = x.float() @ w.float().T
    if t is not None and lora_B is not None:
        y += scaling * (t.float() @ lora_B.to(x.dtype).float().T)
    if bias is not None:
        y += bias.float()
    if factor is not None:
        y *= factor.float()
    return y.to(x.dtype)
