"""The adapter's backward pass over a tall matrix: both products, sums, dropout from a seed."""

import pytest
import torch
from helpers import on_gpus, to

from nf4.error import exact
from nf4.reference import lora_grad as reference
from nf4.tools.cost import Device
from nf4.tools.terms import Dropout

# m, columns, rank, with w and sums, dropout, dtype, transposed (False if none)
CASES = {
    "both": (70, 192, 16, True, 0.0, torch.bfloat16),
    "across_only": (130, 300, 5, False, 0.0, torch.float16),
    "dropout": (66, 200, 16, False, 0.3, torch.bfloat16),
    "rank_64": (200, 136, 64, True, 0.0, torch.bfloat16),
    "transposed": (70, 200, 5, False, 0.0, torch.bfloat16, True),
    "no_rows": (0, 64, 16, True, 0.0, torch.bfloat16),
}


def arguments(m, c, r, both, p, dtype, transposed=False):
    w = torch.randn(c, r) if both else None
    seed = torch.tensor(99) if p else None
    z, v = torch.randn(m, c).to(dtype), torch.randn(m, r).to(dtype)
    return z, v, w, 0.5, both, Dropout(p, seed), transposed


def check(kernel, args) -> None:
    found, expected = kernel.lora_grad(*args), reference.lora_grad(*args)
    for ours, theirs, right in zip(found, expected, exact.lora_grad(*args), strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert right.share(ours) <= 1


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_lora_grad_kernel_matches_reference(case, device) -> None:
    from nf4.kernels import lora_grad as kernel

    check(kernel, to(arguments(*case), device))


@pytest.mark.parametrize(("case", "emulate"), on_gpus(CASES), indirect=["emulate"])
def test_lora_grad_ptx_matches_reference(case, emulate) -> None:
    from nf4.kernels import lora_grad as kernel

    args = arguments(*CASES[case])
    check(kernel, args)
    if args[0].numel():
        first, again = kernel.lora_grad(*args)[0], kernel.lora_grad(*args)[0]
        assert torch.equal(first, again)


def few_multiprocessors(monkeypatch, kernel) -> None:
    """Let the kernel cut its work for a small GPU: a few long chunks of rows."""
    device = Device("small", 1e12, 1e14, 4, 1e9)
    monkeypatch.setattr(kernel, "device_of", lambda device_: device)
    monkeypatch.setattr(kernel, "_prepared", kernel._prepared.__wrapped__)  # nothing remembered


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
def test_lora_grad_ptx_of_long_chunks(emulate, monkeypatch) -> None:
    from nf4.kernels import lora_grad as kernel

    few_multiprocessors(monkeypatch, kernel)
    check(kernel, arguments(300, 300, 16, True, 0.0, torch.bfloat16))


MISTAKES = {
    "rows_not_masked": ("lora_grad", "mask_m = offs_m < M", "mask_m = offs_m < M + 1"),
    "chunk": ("lora_grad", "chunk.to(tl.int64) * C", "chunk.to(tl.int64) * 0"),
    "strip": ("lora_grad", "row = strip.to(tl.int64) * M", "row = strip.to(tl.int64) * 0"),
    "sums_of_the_last_step": ("lora_grad", "sums += tl.sum(z", "sums = tl.sum(z"),
    "dropout_of_another_strip": ("lora_grad", "columns = strip * BLOCK_C", "columns = strip * 0"),
    "factor": ("lora_grad", "scaling / (1 - dropout.p)", "float(scaling)"),
    "parts_of_a_chunk": ("lora_grad", "across_ptr, C * rank, chunks,", "across_ptr, C * rank, 1,"),
    "parts_added_too_late": ("lora_grad", "first_sums = first_along + _", "first_sums = 0 * _"),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_lora_grad_ptx_of_a_wrong_kernel_is_noticed(
    mistake, emulate, tmp_path, monkeypatch
) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("lora_grad", *mistake, tmp_path)
    few_multiprocessors(monkeypatch, wrong)
    both, dropout = (True, 0.0, torch.bfloat16), (False, 0.3, torch.bfloat16)
    cases = [*CASES.values(), (300, 300, 16, *both), (300, 600, 16, *dropout)]
    assert is_noticed(check, ((wrong, arguments(*case)) for case in cases))
