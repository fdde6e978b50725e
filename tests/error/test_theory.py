"""The error expected of quantization: against Monte Carlo, plain integration, known figures."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import nf4
from nf4.codebook import BLOCK_SIZES
from nf4.error.distributions import distribution_of, scales
from nf4.error.theory import cells

DISTRIBUTIONS = ("normal", "laplace", "student-t:5", "student-t:3")
# Measured on 1024 x 1024 values of N(0, 1) with single quantization: mean absolute error, its
# spread, and root of the mean squared error, by block size
MEASURED = {
    32: (0.067746, 0.000069, 0.08729),
    64: (0.072798, 0.000074, 0.09196),
    128: (0.076831, 0.000091, 0.09557),
    256: (0.080337, 0.000102, 0.09870),
    512: (0.083547, 0.000143, 0.10158),
    1024: (0.086610, 0.000187, 0.10438),
    2048: (0.089592, 0.000251, 0.10714),
    4096: (0.092547, 0.000360, 0.11005),
}


def sampled(block_size: int, double_quant: bool, distribution: str, tensors: int) -> np.ndarray:
    """Return measured mse, mae and max_abs of random tensors, a row each."""
    rng = np.random.default_rng(block_size)
    f, rows = distribution_of(distribution), []
    for _ in range(tensors):
        w = torch.from_numpy(f.sample((512, 1024), rng).astype(np.float32))
        e = nf4.quantization_error(w, nf4.quantize(w, block_size, double_quant))
        rows.append((e.mse, e.mae, e.max_abs))
    return np.array(rows)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_theory_agrees_with_monte_carlo(block_size, double_quant) -> None:
    """Within four standard errors of the samples' mean."""
    rows = sampled(block_size, double_quant, "normal", 12)
    e = nf4.expected_error(block_size, double_quant, numel=512 * 1024)
    standard_error = rows.std(axis=0, ddof=1) / math.sqrt(len(rows))
    assert (np.abs(rows.mean(axis=0) - [e.mse, e.mae, e.max_abs]) < 4 * standard_error).all()


@pytest.mark.parametrize(
    ("distribution", "block_size"), [("laplace", 32), ("laplace", 1024), ("student-t:5", 64)]
)
def test_theory_agrees_with_monte_carlo_beside_the_normal(distribution, block_size) -> None:
    for double_quant in (False, True):
        rows = sampled(block_size, double_quant, distribution, 6)[:, :2]
        e = nf4.expected_error(block_size, double_quant, distribution=distribution)
        standard_error = rows.std(axis=0, ddof=1) / math.sqrt(len(rows))
        assert (np.abs(rows.mean(axis=0) - [e.mse, e.mae]) < 4 * standard_error).all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_theory_gives_the_measured_figures(block_size) -> None:
    mae, spread, rmse = MEASURED[block_size]
    e = nf4.expected_error(block_size, double_quant=False)
    assert abs(e.mae - mae) < 2 * spread
    assert abs(e.rmse - rmse) < 3 * spread * rmse / mae
    assert e.rmse == pytest.approx(math.sqrt(e.mse)) and e.relative == e.rmse
    assert e.sqnr_db == pytest.approx(-20 * math.log10(e.rmse))


@pytest.mark.parametrize("block_size", [32, 4096])
def test_theory_is_the_double_integral(block_size) -> None:
    """Written out and left to scipy, one cell and one scale at a time."""
    book = np.array(nf4.codebook.NF4_LEVELS)
    edges = cells(book)

    def inner(m: float, power: int) -> float:
        total = 0.0
        for low, high, level in zip(edges, edges[1:], book, strict=False):
            points = sorted({low * m, min(max(level, low), high) * m, high * m})
            for a, b in itertools.pairwise(points):
                error = lambda x, c=level * m: abs(x - c) ** power * stats.norm.pdf(x)  # noqa: E731
                total += integrate.fixed_quad(error, a, b, n=8)[0]
        return total / (2 * stats.norm.cdf(m) - 1)

    def outer(m: float, power: int) -> float:
        inside = 2 * stats.norm.cdf(m) - 1
        density = block_size * inside ** (block_size - 1) * 2 * stats.norm.pdf(m)
        return density * (block_size - 1) / block_size * inner(m, power)

    m, *_ = scales(distribution_of("normal"), block_size)
    e = nf4.expected_error(block_size, double_quant=False)
    for power, found in ((2, e.mse), (1, e.mae)):
        points = np.linspace(m[m > 0.3][0], 7.5, 40)
        exact = sum(
            integrate.fixed_quad(np.vectorize(lambda x: outer(x, power)), a, b, n=6)[0]  # noqa: B023
            for a, b in itertools.pairwise(points)
        )
        assert found == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_partial_moments_are_integrals(name) -> None:
    f = distribution_of(name)
    for power, x in itertools.product((0, 1, 2), (-3.0, -0.4, 0.0, 1.7)):
        density = lambda t, p=power: t**p * f.density(np.array(t))  # noqa: E731
        exact = integrate.quad(density, -np.inf, x, limit=500, epsabs=1e-12)[0]
        assert f.moment(power, np.array(x)) == pytest.approx(exact, abs=1e-8)
    far = 1e12 if f.heavy_tails else 38.0
    assert f.moment(2, np.array(far)) == pytest.approx(1, abs=1e-9)
    tail = np.array([0.3, 1e-3, 1e-12])
    below = f.moment(0, -f.inverse_tail(tail))
    assert below == pytest.approx(tail, rel=1e-6)
    values = f.sample((4, 1000), np.random.default_rng(0))
    assert values.shape == (4, 1000) and abs(values.mean()) < 0.1


def test_error_grows_with_the_block_and_with_the_tails() -> None:
    by_block = [nf4.expected_error(b).mse for b in BLOCK_SIZES]
    assert by_block == sorted(by_block)
    by_tail = [nf4.expected_error(1024, distribution=d).mse for d in DISTRIBUTIONS]
    assert by_tail == sorted(by_tail)
    a, b = nf4.expected_error(64), nf4.expected_error(64, numel=2**30)
    assert a.mse == b.mse and a.max_abs < b.max_abs < 1.2


BAD = {
    "block_size": ({"block_size": 48}, ValueError, "block_size: expected a power of two"),
    "double_quant": ({"double_quant": 1}, TypeError, "double_quant: expected a bool, got int"),
    "numel": ({"numel": 0}, ValueError, "numel: expected at least 1, got 0"),
    "codebook": ({"codebook": "nf5"}, ValueError, "codebook: expected one of nf4, fp4, .*'nf5'"),
    "levels": ({"codebook": (0.0, 1.0, 0.5)}, ValueError, "expected levels that ascend within"),
    "levels_wide": ({"codebook": (-2.0, 1.0)}, ValueError, "expected levels that ascend within"),
    "distribution": ({"distribution": "cauchy"}, ValueError, "distribution: expected normal, lapl"),
    "degrees": ({"distribution": "student-t:2"}, ValueError, "with NU > 2, got 'student-t:2'"),
    "no_degrees": ({"distribution": "student-t:x"}, ValueError, "with NU > 2, got 'student-t:x'"),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_expected_error_refuses(options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        nf4.expected_error(**options)


def test_measured_error_knows_what_theory_expects() -> None:
    w = 0.02 * torch.randn(512, 512)
    e = nf4.quantization_error(w, nf4.quantize(w))
    assert e.rms == pytest.approx(w.double().square().mean().sqrt().item(), rel=1e-6)
    assert abs(e.kurtosis) < 0.05
    for field in ("mse", "rmse", "mae", "relative", "sqnr_db"):
        assert getattr(e, field) == pytest.approx(getattr(e.expected, field), rel=0.02)
    assert e.max_abs == pytest.approx(e.expected.max_abs, rel=0.2)
    w[3, 4] = 5.0  # an outlier, and a kurtosis that tells of it
    outlier = nf4.quantization_error(w, nf4.quantize(w))
    assert outlier.kurtosis > 1000
    zero = nf4.quantization_error(torch.zeros(64), nf4.quantize(torch.zeros(64)))
    assert (zero.expected.mse, zero.expected.sqnr_db) == (0, math.inf)
    assert math.isnan(zero.kurtosis)
