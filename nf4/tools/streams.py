"""Where work goes to: the GPU of a tensor, and the stream that is current there.

PyTorch's own functions for this make objects, at several times the cost.
"""

from typing import Any

import torch
from torch import Tensor

# Not in builds for CPUs
current_gpu: Any = getattr(torch._C, "_cuda_getDevice", None)  # the index
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # handle, by index


def gpu_index(tensor: Tensor) -> int:
    """Return the index of a tensor's GPU, negative for other devices."""
    return tensor.get_device() if tensor.is_cuda else -1


def is_default_stream(index: int) -> bool:
    """Return whether work on a GPU goes to its default stream, which no CUDA graph captures."""
    handle: int = current_stream(index)
    return handle == 0
