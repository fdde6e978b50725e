"""Several weights multiplied in one launch: the bits of a launch for each."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from helpers import ProductCase, on_gpus

from nf4.reference import row_group as reference
from nf4.tools.terms import NO_DROPOUT, Epilogue


@dataclass(frozen=True)
class Case:
    """x ``[m, k]``, weights of N rows each, and adapters of rank r if not 0."""

    m: int
    ns: tuple[int, ...]
    k: int = 512
    r: int = 0
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "two": Case(1, (32, 48)),
    "three": Case(1, (48, 16, 32), 768),
    "two_rows_adapters_biases": Case(2, (64, 16, 16), r=16, bias=True),
    "rank_3_fp16": Case(2, (16, 64), r=3, dtype=torch.float16),
    "uneven_shares": Case(1, (16, 16, 16), 1792, r=20),
}


def operands(case: Case, device: torch.device):
    """Return x, weights, biases, and lora_A and lora_B of each weight."""
    made = [
        ProductCase(case.m, n, case.k, dtype=case.dtype, bias=case.bias).make().to(device)
        for n in case.ns
    ]
    factors = [
        (torch.randn(case.r, case.k, device=device), torch.randn(n, case.r, device=device))
        for n in case.ns
    ]
    weights = [product.arguments()[1] for product in made]
    return made[0].x, weights, [product.bias for product in made], factors


def check(kernel, case: Case, device: torch.device, emulate=None) -> None:
    """Hold one launch to a launch for each; where it is emulated, the members take turns."""
    from nf4.kernels import lora_down, matmul_row
    from nf4.kernels._configs import lora_down_config

    x, weights, biases, factors = operands(case, device)
    t, low = None, ()
    if case.r:
        if emulate is not None:
            split = lora_down_config(case.m, case.k, case.r, device).split_k
            turns = product(range(split), range(len(case.ns)))
            emulate.programs = [(0, share, member) for share, member in turns]
        t = kernel.down_group(x, [a for a, _ in factors])
        if emulate is not None:
            emulate.programs = None
        low = [(b, 0.5 + i) for i, (_, b) in enumerate(factors)]
        for (a, _), ours in zip(factors, t, strict=True):
            assert torch.equal(ours, lora_down.lora_down(x, a, NO_DROPOUT))
        assert reference.down_group(x, [a for a, _ in factors]).shape == t.shape
    found = kernel.row_group(x, weights, biases, t, low)
    right = reference.row_group(x, weights, biases, t, low)
    step = 2**-7 if case.dtype == torch.bfloat16 else 2**-10  # sums in another order
    for y, expected in zip(found, right, strict=True):
        torch.testing.assert_close(y, expected, rtol=step, atol=1e-3)
    for i, (weight, y) in enumerate(zip(weights, found, strict=True)):
        terms = (t[i].clone(), *low[i]) if case.r else ()
        right = matmul_row.matmul_row(x, weight, Epilogue(biases[i], *terms))
        assert y.shape == right.shape and torch.equal(y, right)


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_row_group_kernel_has_the_bits_of_a_launch_each(case, device) -> None:
    from nf4.kernels import row_group as kernel

    check(kernel, case, device)


@pytest.mark.parametrize(("case", "emulate"), on_gpus(CASES), indirect=["emulate"])
def test_row_group_ptx_has_the_bits_of_a_launch_each(case, emulate) -> None:
    from nf4.kernels import row_group as kernel

    check(kernel, CASES[case], torch.device("cpu"), emulate)
    case = CASES[case]
    grouped = ["_down_group_kernel"] * (case.r > 0) + ["_row_group_kernel"]
    assert [name for name in emulate.launches if "group" in name] == grouped


MISTAKES = {
    "member": ("(row >= N0 + N1)", "(row >= N1)"),
    "rows_of_the_first": ("row - _choose(0, N0, N0 + N1", "row - _choose(0, N0, N0"),
    "t_of_the_first": ("member * (M * rank)", "0"),
    "t_of_another_place": ("member * M * rank", "member * rank"),
    "arrived": ("arrived_ptr + member", "arrived_ptr"),
    "parts": ("parts_ptr + member * (", "parts_ptr + 0 * ("),
    "scalings": ("scaling_1, scaling_2, member", "scaling_2, scaling_1, member"),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_row_group_ptx_of_a_wrong_kernel_is_noticed(mistake, emulate, tmp_path) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("row_group", "row_group", *mistake, tmp_path)
    cpu = torch.device("cpu")
    assert is_noticed(check, ((wrong, case, cpu, emulate) for case in CASES.values()))
