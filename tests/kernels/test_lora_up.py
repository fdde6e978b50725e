"""The adapter's output side: values, bias, dropout from a seed, factors of any strides."""

import pytest
import torch
from helpers import on_gpus, to

from nf4.error import exact
from nf4.reference import lora_up as reference
from nf4.tools.terms import Dropout

# m, n, rank, bias, dropout, transposed factor, dtype
CASES = {
    "bias": (70, 192, 16, True, 0.0, True, torch.bfloat16),
    "odd": (5, 77, 3, False, 0.0, False, torch.float16),
    "dropout": (66, 200, 16, False, 0.3, False, torch.bfloat16),
    "rank_100": (20, 136, 100, True, 0.1, True, torch.float16),
}


def arguments(m, n, r, bias, p, transposed, dtype):
    b = torch.randn(n, r).T if transposed else torch.randn(r, n)
    seed = torch.tensor(42) if p else None
    return torch.randn(m, r).to(dtype), b, 0.5, torch.randn(n) if bias else None, Dropout(p, seed)


def check(kernel, args) -> None:
    out, expected = kernel.lora_up(*args), reference.lora_up(*args)
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert exact.lora_up(*args).share(out) <= 1
    assert (out != expected).float().mean() < 0.02


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_lora_up_kernel_matches_reference(case, device) -> None:
    from nf4.kernels import lora_up as kernel

    check(kernel, to(arguments(*case), device))


@pytest.mark.parametrize(("case", "emulate"), on_gpus(CASES), indirect=["emulate"])
def test_lora_up_ptx_matches_reference(case, emulate) -> None:
    from nf4.kernels import lora_up as kernel

    check(kernel, arguments(*CASES[case]))


MISTAKES = {
    "strides": ("lora_up", "offs_r[:, None] * stride_br", "offs_r[:, None] * stride_bn"),
    "rank_not_masked": ("lora_up", "& (offs_r < rank)[:, None]", ""),
    "bias_before_dropout": ("lora_up", "acc *= scaling", "acc *= scaling * scaling"),
    "columns_of_the_mask": ("lora_up", "columns = first_n + 8", "columns = 8"),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_lora_up_ptx_of_a_wrong_kernel_is_noticed(mistake, emulate, tmp_path) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("lora_up", *mistake, tmp_path)
    assert is_noticed(check, ((wrong, arguments(*case)) for case in CASES.values()))
