"""The adapter's input side: values, dropout from a seed, split sums."""

import pytest
import torch
from helpers import on_gpus, to

from nf4.error import exact
from nf4.reference import lora_down as reference
from nf4.tools.terms import Dropout

# m, k, rank, dropout, dtype
CASES = {
    "plain": (70, 192, 16, 0.0, torch.bfloat16),
    "few_rows": (3, 640, 5, 0.0, torch.float16),
    "odd_columns": (20, 77, 8, 0.0, torch.bfloat16),
    "dropout": (33, 200, 16, 0.3, torch.bfloat16),
    "rank_100": (20, 1088, 100, 0.1, torch.float16),
}


def arguments(m, k, r, p, dtype):
    seed = torch.tensor(1234567890123) if p else None
    return torch.randn(m, k).to(dtype), torch.randn(r, k) / k**0.5, Dropout(p, seed)


def check(kernel, args) -> None:
    t, expected = kernel.lora_down(*args), reference.lora_down(*args)
    assert t.dtype == expected.dtype and t.shape == expected.shape
    assert exact.lora_down(*args).share(t) <= 1
    assert (t != expected).float().mean() < 0.02
    for module, made in ((kernel, t), (reference, expected)):
        out = torch.full_like(made, 7)
        assert module.lora_down(*args, out) is out and torch.equal(out, made)


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_lora_down_kernel_matches_reference(case, device) -> None:
    from nf4.kernels import lora_down as kernel

    check(kernel, to(arguments(*case), device))


@pytest.mark.parametrize(("case", "emulate"), on_gpus(CASES), indirect=["emulate"])
def test_lora_down_ptx_matches_reference(case, emulate) -> None:
    from nf4.kernels import lora_down as kernel

    check(kernel, arguments(*CASES[case]))


MISTAKES = {
    "mask_of_columns": ("lora_down", "mask_k = offs_k < K - first", "mask_k = offs_k < K"),
    "not_divided": ("lora_down", "t = acc * kept_inverse", "t = acc"),
    "half": ("_dropout", "(16 * i)", "(15 * i)"),
    "order_of_words": ("_dropout", "_half(w0, 0), _half(w2, 0)", "_half(w0, 0), _half(w1, 0)"),
    "counter": ("_dropout", "row_length // 8", "row_length // 4"),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_lora_down_ptx_of_a_wrong_kernel_is_noticed(mistake, emulate, tmp_path) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("lora_down", *mistake, tmp_path)
    assert is_noticed(check, ((wrong, arguments(*case)) for case in CASES.values()))
