"""Rounding to any codebook, and its error by theory and by measurement."""

import pytest
import torch

import nf4
from nf4.codebook import BLOCK_SIZES
from nf4.error.codebooks import CODEBOOKS, codebook
from nf4.error.schemes import Scheme, codebook_errors, compared, round_to_codebook


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(64, 96), (7, 33), (5,), (), (0, 64)], ids=str)
def test_rounding_to_nf4_gives_the_bits_of_dequantize(shape, block_size, double_quant) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(shape).to(dtype)
        q = nf4.quantize(w, block_size, double_quant)
        found = round_to_codebook(w, "nf4", block_size, double_quant)
        assert torch.equal(found, nf4.dequantize(q, torch.float32))
        scheme = Scheme("nf4", block_size, double_quant)
        assert torch.equal(scheme.round(w), found)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_value_becomes_the_nearest_level(name) -> None:
    w = torch.randn(50, 64)
    w[3] = 0
    found = round_to_codebook(w, name)
    scale = w.abs().amax(dim=1)
    if name.startswith("bof4s"):
        scale = w.gather(1, w.abs().argmax(dim=1, keepdim=True))[:, 0]
    grid = torch.tensor(codebook(name))[None] * scale[:, None]
    nearest = (w[:, :, None] - grid[:, None]).abs().amin(dim=2)
    torch.testing.assert_close((found - w).abs(), nearest, rtol=0, atol=1e-6)
    assert (found[3] == 0).all()


def test_int4_is_exact_on_its_own_grid() -> None:
    w = torch.arange(-7, 8).repeat(64).view(-1, 32)[:28].float()
    w[:, 0] = 7
    assert torch.equal(round_to_codebook(w, "int4", 32), w)


def test_theory_and_measurement_agree_for_every_codebook_and_block_size() -> None:
    """Within four standard errors: 80 of them, of which one in 16 000 would be beyond by chance."""
    cheap = [n for n in CODEBOOKS if not n.endswith("mae") and n != "af4"]
    schemes = [Scheme(name, b) for name in cheap for b in BLOCK_SIZES]
    schemes += [Scheme("nf4", b, True) for b in BLOCK_SIZES]
    schemes += [Scheme("af4"), Scheme("bof4-mae"), Scheme("bof4s-mae")]
    seen = []
    rows = codebook_errors(1 << 21, schemes=schemes, progress=lambda *done: seen.append(done))
    assert [row.scheme for row in rows] == schemes
    assert seen == [(i + 1, len(schemes)) for i in range(len(schemes))]
    for row in rows:
        assert abs(row.measured - row.expected) < 4 * row.standard_error, row
        assert row.standard_error < 0.01 * row.measured


def test_least_squares_beat_other_codebooks_of_the_same_size() -> None:
    schemes = [Scheme(scale="mse"), Scheme("bof4s-mse"), Scheme()]
    squares, bof4s, absmax = codebook_errors(1 << 18, schemes=schemes)
    assert squares.measured < bof4s.measured < absmax.measured
    assert squares.expected is None


def test_schemes_say_what_they_are() -> None:
    found = compared()
    assert len(set(found)) == len(found) == 8 * (len(CODEBOOKS) + 3)
    scheme = Scheme("nf4", 128, True, "mse")
    assert scheme.label == "NF4, block 128, least squares, double quantization"
    assert scheme.kind == "NF4, least squares, double quantization"
    w = torch.randn(512, 1024)
    for scheme in (Scheme(), Scheme(double_quant=True), Scheme(block_size=4096)):
        q = nf4.quantize(w, scheme.block_size, scheme.double_quant)
        assert scheme.bits_per_weight == pytest.approx(q.bits_per_weight, abs=1e-3)


def test_what_no_scheme_can_do_is_refused() -> None:
    with pytest.raises(ValueError, match="scale: expected absmax for int4, got 'mse'"):
        Scheme("int4", scale="mse").round(torch.randn(64))
    with pytest.raises(ValueError, match="codebook: expected one of nf4"):
        round_to_codebook(torch.randn(64), "q4_k")
    with pytest.raises(TypeError, match="w: expected"):
        round_to_codebook([1.0], "nf4")
    with pytest.raises(ValueError, match="numel: expected at least 8192, got 64"):
        codebook_errors(64)
