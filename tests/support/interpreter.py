"""Make Triton's interpreter compute with bf16 as a GPU does.

The interpreter keeps bf16 as 16-bit integers; as shipped, a cast to bf16 cuts the lower bits off,
and arithmetic and ``tl.dot`` take the patterns for integers. `repair` rounds casts to nearest even,
and computes in fp32 and rounds once. Triton 3.6 to 3.9.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _rounded(x: np.ndarray) -> np.ndarray:
    """Return fp32 values as the bits of bf16."""
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return values.to(torch.bfloat16).view(torch.uint16).numpy().reshape(x.shape)


def _wide(handle: Any) -> np.ndarray:
    """Return the values of a handle, fp32 where it is bf16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    bits = np.ascontiguousarray(handle.data).astype(np.uint16)
    return torch.from_numpy(bits).view(torch.bfloat16).float().numpy().reshape(bits.shape)


def repair() -> None:
    """Patch Triton's interpreter; calling it again changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "knows_bf16", False):
        return
    builder.knows_bf16 = True
    shipped_binary, shipped_dot = builder.binary_op, builder.create_dot

    def rounding(shipped: Callable[..., Any]) -> Callable[..., Any]:
        def cast(self: Any, source: Any, target: Any, *mode: Any) -> Any:
            to, from_ = target.scalar, source.dtype.scalar
            if to == tl.bfloat16 and from_ in (tl.float16, tl.float32):
                return interpreter.TensorHandle(_rounded(source.data), to)
            return shipped(self, source, target, *mode)

        return cast

    def binary(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return shipped_binary(self, left, right, op)
        result = op(_wide(left), _wide(right))
        if result.dtype == bool:
            return interpreter.TensorHandle(result, tl.int1)
        return interpreter.TensorHandle(_rounded(result), tl.bfloat16)

    def dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return shipped_dot(self, a, b, acc, *options)
        product = np.matmul(_wide(a), _wide(b), dtype=np.float32)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    builder.cast_impl = rounding(builder.cast_impl)
    builder.create_fp_to_fp = rounding(builder.create_fp_to_fp)
    builder.binary_op, builder.create_dot = binary, dot
