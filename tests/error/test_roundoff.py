"""Limits of rounding errors: right results are within, results with a rounding more are not."""

import json
import os
import subprocess
import sys

import pytest
import torch

import nf4
from nf4.error import exact
from nf4.error.roundoff import Roundoff, rounding, summing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = [(1, 96, 512), (600, 96, 512), (8, 33, 4096), (600, 7, 33)]  # M, N, K


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 0.03, 3e4, 1e-6])
def test_rounding_has_the_mean_square_that_is_said(size, dtype) -> None:
    values = size * torch.rand(200_000, dtype=torch.float64)
    errors = values.to(dtype).double() - values
    # 200,000 squares of a mean of step^2 / 12 and a deviation of 0.9 times that: 1 % is 5 sigma
    assert errors.square().sum().item() == pytest.approx(
        rounding(values, dtype).sum().item(), rel=0.01
    )


def test_rounding_of_what_a_dtype_holds_of_zero_is_nothing() -> None:
    assert rounding(torch.zeros(3, dtype=torch.float64), torch.bfloat16).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["of both signs", "of one sign", "few large"])
def test_summing_covers_sums_one_after_another(kind) -> None:
    """The order of the largest error that anything multiplies in."""
    terms = torch.randn(2000, 512)
    if kind == "of one sign":
        terms = terms.abs()
    if kind == "few large":
        terms = terms * (1 + 100 * (torch.rand_like(terms) < 0.01))
    found = torch.zeros(2000)
    for column in terms.T:
        found = found + column
    wide = terms.double()
    total, squares = wide.sum(dim=1), wide.square().sum(dim=1)
    limit = Roundoff().add(summing(squares, total, 512, torch.float32)).limit
    # Mantissas are not all 1, nor are products of them rounded here: 0.74 and less of u^2 / 3
    assert 0.5 * limit < (found - total).norm() <= limit


def test_a_limit_is_that_of_correlated_errors_too() -> None:
    """Errors of two numbers that reach a thousand results are no thousand errors."""
    through = torch.ones(2, 1000, dtype=torch.float64)
    squares = torch.full((1, 2), 1 / 12, dtype=torch.float64)
    limit = Roundoff().add(squares, through).limit
    assert limit > 1000**0.5 > Roundoff().add(torch.full((1000,), 2 / 12)).limit
    wide = torch.ones(2, 2000, dtype=torch.float64) / 2**0.5  # more than a Gram matrix is made of
    assert Roundoff().add(squares.expand(1, 2).repeat(1, 1000), wide.T).limit > 0


def made(m: int, n: int, k: int, dtype: torch.dtype):
    q = nf4.quantize(torch.randn(n, k) / k**0.5)
    return torch.randn(m, k).to(dtype), q, torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_right_product_is_within_its_limit_for_any_seed(case, dtype) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        x, q, bias = made(*case, dtype)
        right = exact.linear(x, q, bias)
        w = nf4.dequantize(q, dtype)
        library = (x.float() @ w.float().T + bias.float()).to(dtype)
        assert right.share(library) <= 1 and right.share(nf4.linear(x, q, bias)) <= 1


def mistakes(x, q, bias) -> dict[str, torch.Tensor]:
    """Return results with one mistake each."""
    dtype, w = x.dtype, nf4.dequantize(q, x.dtype)
    wide = (x.double(), w.double(), bias.double())
    y = wide[0] @ wide[1].T + wide[2]
    found = {
        "one element of a hundred": torch.where(
            torch.arange(y.numel()).view_as(y) % 100 == 7, 0, y
        ),
        "a thousandth": y * (1.001 if dtype == torch.float32 else 1.01),
        "the last column": wide[0][:, :-1] @ wide[1][:, :-1].T + wide[2],
        "sums in 16 bits": (wide[0].half() @ wide[1].half().T).double() + wide[2],
    }
    if dtype == torch.float32:
        found["products of TF32"] = _tf32(wide[0]) @ _tf32(wide[1]).T + wide[2]
    else:
        found["rounded before the bias"] = (wide[0] @ wide[1].T).to(dtype).double() + wide[2]
        del found["sums in 16 bits"]
    return {name: wrong.to(dtype) for name, wrong in found.items()}


def _tf32(values: torch.Tensor) -> torch.Tensor:
    return (values.float().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mistakes_are_beyond_the_limit(dtype) -> None:
    x, q, bias = made(600, 96, 512, dtype)
    right = exact.linear(x, q, bias)
    shares = {name: right.share(wrong) for name, wrong in mistakes(x, q, bias).items()}
    assert all(share > 1 for share in shares.values()), shares


@pytest.mark.parametrize("what", ["y", "dx", "dA", "dB", "dbias"])
def test_a_wrong_gradient_of_an_adapter_is_beyond_its_limit(what) -> None:
    (x, q, bias), dy = made(100, 96, 512, torch.bfloat16), torch.randn(100, 96).bfloat16()
    a, b = torch.randn(8, 512) / 22, torch.randn(96, 8)
    right = getattr(exact.LoraLinear(x, q, a, b, 2.0, bias, dy), what)
    value = right.value
    assert right.share(value.to(torch.bfloat16 if what in ("y", "dx") else torch.float32)) <= 1
    assert right.share(value.clone().index_fill_(0, torch.tensor([3]), 0.0)) > 1
    assert right.share(value * 1.01) > 1


def test_a_result_that_is_not_finite_is_not_within_a_limit() -> None:
    x, q, bias = made(3, 16, 64, torch.float32)
    right = exact.linear(x, q, bias)
    assert not right.share(torch.full((3, 16), torch.nan)) <= 1
    assert (
        exact.product(torch.zeros(2, 3), torch.zeros(3, 4), *[torch.float32] * 2).share(
            torch.zeros(2, 4)
        )
        == 0
    )


def test_gradients_need_the_gradient_of_y() -> None:
    x, q, _ = made(3, 16, 64, torch.float32)
    with pytest.raises(ValueError, match="dy: expected the gradient of y"):
        _ = exact.LoraLinear(x, q, torch.ones(1, 64), torch.ones(16, 1)).dx


CODE = """
import json, sys, torch
from nf4.error import verify
verify._SHAPES, verify._ROWS = ((96, 130), (7, 33)), (1, 17)
torch.set_num_threads(int(sys.argv[1]))
rows = [r for r in verify.verify("cpu", seed=1) if r.against == "float64"]
print(json.dumps([len(rows), [str(r) for r in rows if not r.ok]]))
"""


@pytest.mark.parametrize(
    ("isa", "threads"), [("SSE41", "1"), ("AVX", "2"), ("AVX2", "1"), ("AVX512_CORE", "2")]
)
def test_verify_holds_with_other_instructions(isa, threads) -> None:
    """What a library is told to stay below; a CPU without them stays below anyway."""
    told = {
        "ONEDNN_MAX_CPU_ISA": isa,
        "ATEN_CPU_CAPABILITY": "default" if isa != "AVX2" else "avx2",
    }
    told["MKL_CBWR"] = "COMPATIBLE" if isa == "SSE41" else isa.partition("_")[0]
    command = [sys.executable, "-c", CODE, threads]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **told})
    assert done.returncode == 0, done.stderr
    compared, wrong = json.loads(done.stdout)
    assert compared == 156 and wrong == []
