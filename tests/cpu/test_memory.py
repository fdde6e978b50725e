"""Arrays over tensors' memory."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="nf4.cpu needs numba")

import nf4
from nf4.cpu._memory import array_of

TYPES = [
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
]


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)])
def test_an_array_is_the_tensor_s_memory(shape, dtype) -> None:
    tensor = torch.arange(12)[: int(np.prod(shape))].reshape(shape).to(dtype)
    array = array_of(tensor)
    assert array.shape == shape and array.dtype == tensor.numpy().dtype
    assert np.array_equal(array, tensor.numpy())
    if tensor.numel():
        array.flat[0] = 1
        assert tensor.flatten()[0] == 1


def test_an_array_of_strides_holds_its_memory() -> None:
    array = array_of(torch.arange(12.0).view(3, 4).t()[1:])
    assert array.tolist() == [[1, 5, 9], [2, 6, 10], [3, 7, 11]]


@pytest.mark.parametrize("double_quant", [False, True])
def test_memory_that_was_computed_with_may_be_resized(double_quant) -> None:
    """As sharded training does to what it has gathered; numpy's own arrays forbid it."""
    w = torch.randn(64, 128).bfloat16()
    q = nf4.quantize(w, double_quant=double_quant)
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    out = nf4.dequantize(q)
    nf4.lora_linear(x, q, torch.randn(4, 128), torch.randn(64, 4), dropout_p=0.5).sum().backward()
    nf4.quantize(w, scale="mse", weights=torch.rand(128), double_quant=double_quant, out=q)
    for tensor in (w, out, x, *q.tensors()):
        assert tensor.untyped_storage().resizable()
