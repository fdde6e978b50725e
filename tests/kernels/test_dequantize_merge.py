"""Dequantize and merge: one rounding of W + scaling * B @ A."""

import pytest
import torch
from helpers import error, on_gpus, to

import nf4
from nf4.error.exact import Exact, product
from nf4.reference import dequantize
from nf4.reference import dequantize_merge as reference
from nf4.tools.terms import LowRank

# n, k, block size, double quantization, dtype, rank, scaling (0.5 if none)
CASES = {
    "rank_16": (80, 192, 64, True, torch.bfloat16, 16),
    "rank_1": (16, 64, 64, False, torch.bfloat16, 1),
    "scaling_no_power_of_two": (80, 192, 64, True, torch.bfloat16, 16, 0.7),
    "block_32_rank_100": (64, 320, 32, True, torch.float16, 100),
    "long_blocks_rank_256": (48, 1024, 1024, True, torch.bfloat16, 256),
}


def arguments(n, k, block_size, double_quant, dtype, r, scaling=0.5, size=1.0):
    w = torch.randn(n, k) / k**0.5
    f = nf4.to_fragments(nf4.quantize(w, block_size, double_quant))
    a, b = torch.randn(r, k) / k**0.5, size * torch.randn(n, r) / r**0.5
    return f.as_weight(), LowRank(a, b, scaling), dtype


def exact(weight, low_rank, dtype) -> Exact:
    low = (low_rank.scaling * low_rank.lora_B.to(dtype).double(), low_rank.lora_A.to(dtype))
    return product(*low, dtype, dtype, dequantize.dequantize(weight, torch.float64))


def check(kernel, args) -> None:
    out, expected = kernel.dequantize_merge(*args), reference.dequantize_merge(*args)
    assert out.dtype == expected.dtype
    assert exact(*args).share(out) <= 1
    assert (out != expected).float().mean() < 0.01
    step = 2**-7 if out.dtype == torch.bfloat16 else 2**-10
    torch.testing.assert_close(out, expected, rtol=step, atol=1e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_dequantize_merge_kernel_matches_reference(case, device) -> None:
    from nf4.kernels import dequantize_merge as kernel

    check(kernel, to(arguments(*case), device))


@pytest.mark.parametrize(("case", "emulate"), on_gpus(CASES), indirect=["emulate"])
def test_dequantize_merge_ptx_matches_reference(case, emulate) -> None:
    from nf4.kernels import dequantize_merge as kernel

    check(kernel, arguments(*CASES[case]))
    assert emulate.launches == ["merge_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_dequantize_ptx_from_fragments_equals_rows(block_size, dtype, emulate) -> None:
    from nf4.kernels import dequantize as kernel

    q = nf4.quantize(torch.randn(48, 384), block_size)
    f = nf4.to_fragments(q)
    assert torch.equal(kernel.dequantize(f.as_weight(), dtype), nf4.dequantize(q, dtype))


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_dequantize_merge_is_no_worse_than_the_unfused_path(size) -> None:
    """Whatever the adapter's size, rounding the sum costs no more than rounding on the way."""
    weight, low_rank, dtype = arguments(256, 512, 64, True, torch.bfloat16, 16, size=size)
    a, b = low_rank.lora_A.bfloat16(), low_rank.lora_B.bfloat16()
    x = torch.randn(512, 512).to(dtype)
    truth = x.double() @ exact(weight, low_rank, dtype).value.T
    merged = x @ reference.dequantize_merge(weight, low_rank, dtype).T
    w = dequantize.dequantize(weight, dtype)
    unfused = x @ w.T + (x @ a.T) @ b.T * low_rank.scaling
    assert error(merged, truth) <= 1.1 * error(unfused, truth)


MISTAKES = {
    "not_scaled": ("_merge", "out + scaling * acc", "out + acc"),
    "not_scaled_before": ("_merge", "b = b.to(tl.float32) * scaling", "b = b.to(tl.float32)"),
    "folded_though_inexact": ("_merge", "[0]) == 0.5 and", "[0]) > 0 and"),
    "rank_of_the_next_step": (
        "_merge",
        "mask=(offs_r < rank)[:, None]",
        "mask=(offs_r < 64)[:, None]",
    ),
    "columns": ("_merge", "+ u, K // 64 - 1) * 64", ", K // 64 - 1) * 64"),
    "last_tile": ("_merge", "K // 64 - 1)  # the last", "K // 64)  # the last"),
    "rows_not_masked": ("_merge", "row_tiles = tl.minimum(", "row_tiles = tl.maximum("),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_dequantize_merge_ptx_of_a_wrong_kernel_is_noticed(mistake, emulate, tmp_path) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("dequantize_merge", *mistake, tmp_path)
    assert is_noticed(check, ((wrong, arguments(*case)) for case in CASES.values()))
