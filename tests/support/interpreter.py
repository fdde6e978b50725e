"""Make Triton's interpreter round to bf16 as a GPU does.

The interpreter keeps bf16 as 16-bit integers; as shipped, a cast to bf16 cuts the lower bits off.
`repair` makes it round to nearest even, by PyTorch. The project's kernels compute in fp32, so casts
are all they need. Triton 3.6 to 3.9.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _rounded(x: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return values.to(torch.bfloat16).view(torch.uint16).numpy().reshape(x.shape)


def repair() -> None:
    """Patch the casts of Triton's interpreter; calling it again changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_bf16", False):
        return
    builder.rounds_bf16 = True

    def rounding(shipped):
        def cast(self, source, target, *mode):
            to, from_ = target.scalar, source.dtype.scalar
            if to == tl.bfloat16 and from_ in (tl.float16, tl.float32):
                return interpreter.TensorHandle(_rounded(source.data), to)
            return shipped(self, source, target, *mode)

        return cast

    builder.cast_impl = rounding(builder.cast_impl)
    builder.create_fp_to_fp = rounding(builder.create_fp_to_fp)
