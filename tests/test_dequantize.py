import pytest
import torch

import nf4
from nf4.codebook import BLOCK_SIZES, NF4_LEVELS
from nf4.reference import dequantize as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_every_byte(dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    absmax = torch.rand(8) + 0.1
    q = nf4.NF4Tensor(packed, absmax, torch.Size([512]), dtype)
    out = nf4.dequantize(q)
    for i in range(512):
        byte = i // 2
        level = torch.tensor(NF4_LEVELS[byte // 16 if i % 2 == 0 else byte % 16])
        assert out[i] == (level * absmax[i // 64]).to(dtype)


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_matches_bitsandbytes(bnb_parts, block_size, dtype, double_quant) -> None:
    # Rows of whole blocks: where a block straddles rows, bitsandbytes 0.50.2 is wrong on AVX512.
    w = torch.randn(20, 4096).to(dtype)
    theirs = bnb_parts(w, block_size, double_quant)
    assert torch.equal(nf4.dequantize(theirs.q), theirs.dequantized)


@pytest.mark.parametrize("shape", [(5,), (7, 33), (3, 5, 7), (), (130,), (3, 96)], ids=str)
def test_dequantize_odd_shapes_keep_every_element_in_place(shape) -> None:
    w = torch.randn(shape)
    out = nf4.dequantize(nf4.quantize(w, 32, double_quant=False))
    assert out.shape == shape
    flat = torch.cat([w.flatten(), torch.zeros(-w.numel() % 2)])
    whole = nf4.dequantize(nf4.quantize(flat, 32, double_quant=False))
    assert torch.equal(out.flatten(), whole[: w.numel()])


def test_dequantize_to_another_dtype_rounds_once() -> None:
    q = nf4.quantize(torch.randn(64, 64).bfloat16())
    exact = nf4.dequantize(q, torch.float32)
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(nf4.dequantize(q, dtype), exact.to(dtype))
    assert nf4.dequantize(q).dtype == torch.bfloat16


def test_dequantize_double_quantized_is_close_to_single() -> None:
    w = torch.randn(512, 512)
    single, double = (nf4.quantize(w, double_quant=d) for d in (False, True))
    assert torch.equal(single.packed, double.packed)
    ours = nf4.quantization_error(w, double).mse / nf4.quantization_error(w, single).mse
    assert 1 - 1e-3 < ours < 1.01


KERNEL_SHAPES = [(64, 64), (7, 33), (129, 130), (1,), (), (0, 64), (3, 4096), (300, 72)]


@pytest.mark.kernel
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_kernel_matches_reference(block_size, shape, dtype, double_quant, device):
    from nf4.kernels import dequantize as kernel

    q = nf4.quantize(torch.randn(shape), block_size, double_quant).to(device)
    args = (q.packed, q.absmax, q.absmax2, q.offset, shape, block_size, dtype)
    ours, expected = kernel.dequantize(*args), reference.dequantize(*args)
    assert torch.equal(ours, expected)
    assert torch.equal(ours.signbit(), expected.signbit())


@pytest.mark.kernel
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_dequantize_kernel_every_byte_at_any_alignment(offset, device) -> None:
    from nf4.kernels import dequantize as kernel

    bytes_ = torch.arange(offset + 512, device=device).remainder(256).to(torch.uint8)[offset:]
    args = (bytes_, torch.rand(16, device=device), None, None, (1024,), 64, torch.float32)
    assert torch.equal(kernel.dequantize(*args), reference.dequantize(*args))


@pytest.mark.kernel
def test_dequantize_kernel_keeps_subnormals_and_signs(device) -> None:
    from nf4.kernels import dequantize as kernel

    packed = torch.arange(256, dtype=torch.uint8, device=device)
    absmax = torch.tensor([2.0**-126, 3e38, 0.0, -1.0] * 2, device=device)
    args = (packed, absmax, None, None, (512,), 64, torch.float32)
    ours, expected = kernel.dequantize(*args), reference.dequantize(*args)
    assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))
