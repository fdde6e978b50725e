"""The product of one to four rows on the plain cores: values, shares of K, mistakes."""

import pytest
import torch
from helpers import ProductCase, on_gpus

from nf4.reference import matmul_row as reference

CASES = {
    "one_row": ProductCase(1, 32, 1024),
    "uneven_shares": ProductCase(1, 16, 1792),
    "one_group": ProductCase(3, 32, 256),
    "adapter_and_bias": ProductCase(2, 48, 768, r=16, bias=True),
    "four_rows_fp16": ProductCase(4, 32, 512, dtype=torch.float16, r=3, bias=True),
    "factor": ProductCase(1, 48, 512, dtype=torch.float16, bias=True, scaling=1.0, factor=True),
    "rank_100": ProductCase(1, 32, 512, r=100),
}


def check(kernel, product) -> torch.Tensor:
    """Hold a result to the reference, and to float64."""
    assert kernel.takes(product.x.shape[1], 64)
    return product.check(kernel.matmul_row, reference.matmul_row)


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matmul_row_kernel_matches_reference(case, device) -> None:
    from nf4.kernels import matmul_row as kernel

    product = case.make().to(device)
    y = check(kernel, product)
    assert torch.equal(y, kernel.matmul_row(*product.arguments()))


@pytest.mark.parametrize(("case", "emulate"), on_gpus(CASES), indirect=["emulate"])
def test_matmul_row_ptx_matches_reference(case, emulate) -> None:
    from nf4.kernels import matmul_row as kernel

    check(kernel, CASES[case].make())
    assert emulate.launches == ["_matmul_row_kernel"]


def shifted(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """Return a tensor that begins so many elements after where memory is aligned."""
    flat = torch.empty(tensor.numel() + by, dtype=tensor.dtype)
    return flat[by:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("part", ["x", "packed", "absmax"])
def test_matmul_row_ptx_of_what_begins_in_the_middle_of_a_word(part, emulate) -> None:
    from nf4.kernels import matmul_row as kernel

    x, weight, _ = ProductCase(1, 32, 512).make().arguments()
    expected = kernel.matmul_row(x, weight)
    aligned = {"x": x, **weight._asdict()}[part]
    moved = shifted(aligned, 1)
    assert moved.data_ptr() % 4
    if part == "x":
        x = moved
    else:
        weight = weight._replace(**{part: moved})
    assert torch.equal(kernel.matmul_row(x, weight), expected)


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
def test_matmul_row_ptx_keeps_infinities_where_shares_are_uneven(emulate) -> None:
    from nf4.kernels import matmul_row as kernel

    product = ProductCase(1, 16, 1792).make()
    args = list(product.arguments())
    for group in range(7):
        args[0] = torch.zeros_like(args[0])
        args[0][0, 256 * group] = float("inf")
        assert not kernel.matmul_row(*args).isfinite().any()
        assert torch.equal(kernel.matmul_row(*args).isnan(), reference.matmul_row(*args).isnan())


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
def test_matmul_row_ptx_waits_for_nobody_in_its_loop(emulate, tmp_path) -> None:
    from nf4.kernels import _aot, _sass
    from nf4.kernels import matmul_row as kernel

    cubin = tmp_path / "kernel.cubin"
    for variant in kernel.variants():
        cubin.write_bytes(_aot.compile_for(variant, "sm_90").asm["cubin"])
        code = _sass.disassemble(cubin)
        bodies = [{code[i].base for i in body} for body in _sass.loops(code)]
        working = [body for body in bodies if "SHFL" in body]
        assert len(working) == (variant.constants["STEPS"] > 1)
        assert not any(body & {"BAR", "LDS", "STS"} for body in working)


MISTAKES = {
    "scale_of_another_block": ("codes >> (8 * u)", "codes >> (8 * 0)"),
    "x_of_another_tile": ("256 * group + 64 * u", "256 * group"),
    "half": ("32 * h + 2 * t", "16 * h + 2 * t"),
    "share_with_a_group_more": ("group < end, part", "group <= end, part"),
    "codes_of_this_step_again": ("codes = next_codes", "codes = codes"),
    "words_of_another_share": ("(first_words + step) * 512", "(first_words * 0 + step) * 512"),
    "row_of_t": ("t_ptr + m * rank", "t_ptr"),
    "not_scaled": ("acc += scaling * tl.sum", "acc += tl.sum"),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_matmul_row_ptx_of_a_wrong_kernel_is_noticed(mistake, emulate, tmp_path) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("matmul_row", "matmul_row", *mistake, tmp_path)
    assert is_noticed(check, ((wrong, case.make()) for case in CASES.values()))
