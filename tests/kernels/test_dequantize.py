import pytest
import torch
from helpers import lazy_zeros

import nf4
from nf4.codebook import BLOCK_SIZES, NF4_LEVELS
from nf4.reference import dequantize as reference
from nf4.tensor import Weight

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


@pytest.mark.parametrize("dtype_out", DTYPES, ids=str)
def test_dequantize_into_out(dtype_out) -> None:
    for shape in ((12, 64), (7, 33)):
        q = nf4.quantize(torch.randn(shape))
        expected = nf4.dequantize(q, dtype_out)
        rows, columns = shape
        wide = torch.zeros(rows, columns + 3, dtype=dtype_out)
        for out in (torch.empty(shape, dtype=dtype_out), wide[:, 1:-2], wide.T[2:-1].T):
            assert nf4.dequantize(q, out=out) is out
            assert torch.equal(out, expected)


KERNEL_SHAPES = [(7, 33), (129, 130), (), (0, 64), (3, 4096), (300, 72)]
KERNEL_BLOCK_SIZES = (32, 64, 512, 4096)


def check_kernel(kernel, q: nf4.NF4Tensor, dtype: torch.dtype) -> None:
    args = (q.as_weight(), dtype)
    ours, expected = kernel.dequantize(*args), reference.dequantize(*args)
    assert torch.equal(ours, expected)
    assert torch.equal(ours.signbit(), expected.signbit())


@pytest.mark.kernel
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
@pytest.mark.parametrize("block_size", KERNEL_BLOCK_SIZES)
def test_dequantize_kernel_matches_reference(block_size, shape, dtype, double_quant, device):
    from nf4.kernels import dequantize as kernel

    check_kernel(
        kernel, nf4.quantize(torch.randn(shape), block_size, double_quant).to(device), dtype
    )


@pytest.mark.kernel
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_dequantize_kernel_every_byte_at_any_alignment(offset, device) -> None:
    from nf4.kernels import dequantize as kernel

    bytes_ = torch.arange(offset + 512, device=device).remainder(256).to(torch.uint8)[offset:]
    absmax = torch.rand(16, device=device)
    args = (Weight(bytes_, absmax, None, None, (1024,), 64), torch.float32)
    assert torch.equal(kernel.dequantize(*args), reference.dequantize(*args))


@pytest.mark.kernel
def test_dequantize_kernel_keeps_subnormals_and_signs(device) -> None:
    from nf4.kernels import dequantize as kernel

    packed = torch.arange(256, dtype=torch.uint8, device=device)
    absmax = torch.tensor([2.0**-126, 3e38, 0.0, -1.0] * 2, device=device)
    args = (Weight(packed, absmax, None, None, (512,), 64), torch.float32)
    ours, expected = kernel.dequantize(*args), reference.dequantize(*args)
    assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))


@pytest.mark.kernel
def test_dequantize_kernel_into_out(device) -> None:
    from nf4.kernels import dequantize as kernel

    q = nf4.quantize(torch.randn(33, 70)).to(device)
    args = (q.as_weight(), torch.bfloat16)
    expected = reference.dequantize(*args)
    buffer = torch.zeros(33 * 70 + 1, dtype=torch.bfloat16, device=device)
    for out in (
        buffer[1:].view(33, 70),
        torch.empty(70, 33, dtype=torch.bfloat16, device=device).T,
    ):
        assert kernel.dequantize(*args, out=out) is out
        assert torch.equal(out, expected)


PTX_CASES = {
    "whole_bf16": ((64, 128), 64, torch.bfloat16, True),
    "masked_bf16": ((129, 136), 64, torch.bfloat16, True),
    "odd_fp16": ((7, 33), 32, torch.float16, False),
    "even_fp32": ((5, 30), 32, torch.float32, True),
    "long_blocks": ((300, 72), 4096, torch.bfloat16, True),
    "many_scales": ((64, 1024), 32, torch.bfloat16, True),
}


@pytest.mark.parametrize("case", PTX_CASES.values(), ids=PTX_CASES.keys())
def test_dequantize_ptx_matches_reference(case, emulate) -> None:
    from nf4.kernels import dequantize as kernel

    shape, block_size, dtype, double_quant = case
    check_kernel(kernel, nf4.quantize(torch.randn(shape), block_size, double_quant), dtype)
    assert emulate.launches == ["_dequantize_kernel"]


def test_dequantize_ptx_past_2_31_elements(emulate) -> None:
    from nf4.kernels import dequantize as kernel

    n = 2**31 + 3 * 8192
    packed, out = lazy_zeros(n // 2, torch.uint8), lazy_zeros(n, torch.bfloat16)
    absmax = lazy_zeros(n // 64, torch.float32)
    q = nf4.quantize(torch.randn(8192), double_quant=False)
    packed[-4096:], absmax[-128:] = q.packed, q.absmax
    emulate.programs = [(n // 8192 - 1, 0, 0)]
    kernel.dequantize(Weight(packed, absmax, None, None, (n,), 64), torch.bfloat16, out)
    assert torch.equal(out[-8192:], nf4.dequantize(q, torch.bfloat16))
    assert not out[-16384:-8192].any() and not out[:8192].any()


MISTAKES = {
    "mask_too_wide": ("dequantize", "out_offs // group * group", "out_offs - 1"),
    "mask_too_narrow": ("dequantize", "out_offs // group * group", "out_offs + 1"),
    "bytes_of_the_next_block": ("dequantize", "+ offs, (1, 4)", "+ 4 + offs, (1, 4)"),
    "nibbles_swapped": (
        "dequantize",
        "high * absmax, low * absmax",
        "low * absmax, high * absmax",
    ),
    "absmax_of_the_first_block": (
        "dequantize",
        "map_ptr, first, rows, blocks)",
        "map_ptr, first * 0, rows, blocks)",
    ),
    "lane": ("_decode", "n{i}, 0x101f", "n{i}, 0x1f1f"),
    "shift": ("_decode", "8 * byte + 4)", "8 * byte + 3)"),
    "absmax2_of_the_first_part": ("_decode", "absmax2_ptr + first // 256", "absmax2_ptr"),
    "contracted": ("_launch", '"enable_fp_fusion": False', '"enable_fp_fusion": True'),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_dequantize_ptx_of_a_wrong_kernel_is_noticed(mistake, emulate, tmp_path) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("dequantize", *mistake, tmp_path)
    cases = (
        (wrong, nf4.quantize(torch.randn(shape), block_size, double_quant), dtype)
        for shape, block_size, dtype, double_quant in PTX_CASES.values()
    )
    assert is_noticed(check_kernel, cases)
