"""Say which code multiplies by a quantized weight, where and why."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nf4.ops.registry import implementation
from nf4.tensor import NF4Tensor, check_nf4

# What nf4.cpu.linear.path returns, in words
_ON_A_CPU = {
    "few rows": "few rows are multiplied without writing W",
    "bf16": "slabs of W are dequantized and multiplied by the CPU's instructions for bf16",
    "slabs": "slabs of W are dequantized and multiplied",
}


@dataclass(frozen=True)
class Explanation:
    """What `explain` says.

    Attributes:
        kernel: what runs: "matmul_row", "matmul_small", "matmul" or "dequantize" on a GPU, else
            the function.
        reason: why, in a sentence.
        modelled_seconds: time of the product by nf4/tools/cost.py, not measured; None off a GPU.
    """

    kernel: str
    reason: str
    modelled_seconds: float | None = None

    def __str__(self) -> str:
        """Return one line."""
        time = ""
        if self.modelled_seconds is not None:
            time = f"; modelled: {1e6 * self.modelled_seconds:.1f} µs"
        return f"{self.kernel}: {self.reason}{time}"


def explain(shape: Sequence[int], q: NF4Tensor, dtype: torch.dtype | None = None) -> Explanation:
    """Say what multiplies an input by a quantized weight, why, and how long a model expects.

    Args:
        shape: of x, ``[..., K]``.
        q: quantized W ``[N, K]``; its device and layout decide.
        dtype: of x; that of q by default.

    Returns:
        An `Explanation`, which prints as one line.

    Raises:
        TypeError: q is no NF4Tensor, or dtype no torch.dtype.
        ValueError: shape does not fit q, or q is no matrix.
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
    m, kind = math.prod(shape[:-1]), q.device.type
    function = implementation("linear", kind)
    package = function.__module__.rpartition(".")[0]
    if package == "nf4.gpu":
        from nf4.gpu.plan import plan

        chosen = plan(m, (n, k), dtype, q.layout, q.block_size, q.double_quant, q.device)
        return Explanation(chosen.kernel, chosen.reason, chosen.seconds)
    missing = {"cpu": "numba", "cuda": "triton"}.get(kind)
    if package == "nf4.cpu":
        path = importlib.import_module("nf4.cpu.linear").path(m, k, dtype, q.block_size)
        how = _ON_A_CPU[path]
        reason = f"on a CPU with numba: {how}"
    elif missing is not None:
        reason = f"{missing} is not installed: the reference, in plain PyTorch"
    else:
        reason = f"no kernels for {kind}: the reference, in plain PyTorch"
    return Explanation(f"{function.__module__}.{function.__name__}", reason)


def wants_fragments(shape: torch.Size, block_size: int, device: torch.device) -> bool:
    """Return whether layers on a device hold a weight of this shape in fragments."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    from nf4.gpu import plan

    return plan.wants_fragments(shape, block_size, device)
