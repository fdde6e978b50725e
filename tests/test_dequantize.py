import pytest
import torch

import nf4
from nf4.codebook import BLOCK_SIZES, NF4_LEVELS

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
