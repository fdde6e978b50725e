"""Other codebooks of 16 levels: those published, and least error among their kind."""

import json
from pathlib import Path

import numpy as np
import pytest

import nf4
from nf4.error.codebooks import CODEBOOKS, COMPUTED, codebook

# Yoshida 2023, https://arxiv.org/abs/2306.06965, by block size
AF4 = {
    32: (-1.0, -0.72380075, -0.54068711, -0.3963985, -0.2723577, -0.15956821, -0.05258802, 0.0,
         0.04554747, 0.13780891, 0.23375854, 0.33656744, 0.4508456, 0.58437857, 0.75299116, 1.0),
    64: (-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
         0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("block_size", AF4)
def test_af4_is_the_published_one(block_size) -> None:
    assert codebook("af4", block_size) == pytest.approx(AF4[block_size], abs=1e-7)


def test_fp4_is_bitsandbytes_one(bnb) -> None:
    import torch

    levels = bnb.get_4bit_type("fp4", device="cpu").unique()
    assert codebook("fp4") == pytest.approx(levels.tolist(), abs=1e-7)
    assert torch.equal(levels, levels.sort().values)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_levels_ascend_to_one(name) -> None:
    levels = codebook(name)
    assert list(levels) == sorted(set(levels)) and 15 <= len(levels) <= 16
    assert levels[-1] == 1 and 0 in levels and levels[0] >= -1
    assert (levels[0] == -1) != name.startswith("bof4s")


@pytest.mark.parametrize("name", ["bof4-mse", "bof4-mae", "bof4s-mse", "bof4s-mae"])
def test_bof4_costs_least_of_its_kind(name) -> None:
    """No level that is not fixed can be moved, either way, to lower what it was computed for."""
    metric, levels = name.rpartition("-")[2], codebook(name)
    fixed = {0.0, 1.0} | (set() if name.startswith("bof4s") else {-1.0})

    def cost(levels) -> float:
        if not name.startswith("bof4s"):
            return getattr(nf4.expected_error(64, False, tuple(levels)), metric)
        from nf4.error.distributions import Normal
        from nf4.error.theory import _expected

        return getattr(_expected(64, False, tuple(levels), True, Normal(), 64), metric)

    least = cost(levels)
    assert least == pytest.approx(getattr(nf4.expected_error(64, False, name), metric), rel=1e-12)
    for i, level in enumerate(levels):
        if level not in fixed:
            for step in (-2e-3, 2e-3):
                moved = np.array(levels)
                moved[i] += step
                assert cost(moved.tolist()) > least


def test_codebooks_rank_as_theory_has_it() -> None:
    """The signed scale helps more than better levels; floats and integers cost more than NF4."""
    mse = {name: nf4.expected_error(64, False, name).mse for name in CODEBOOKS}
    assert mse["bof4s-mse"] < mse["bof4-mse"] < mse["nf4"] < mse["e2m1"] < mse["int4"] < mse["fp4"]
    mae = {name: nf4.expected_error(64, False, name).mae for name in CODEBOOKS}
    assert mae["bof4s-mae"] < mae["bof4-mae"] < mae["nf4"]
    for block_size in (32, 4096):
        gain = (
            nf4.expected_error(block_size, False, "bof4-mse").mse
            / nf4.expected_error(block_size, False).mse
        )
        assert 0.9 < gain < 0.96


def test_unknown_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="codebook: expected one of nf4, fp4, .* got 'q4_k'"):
        codebook("q4_k")
    with pytest.raises(ValueError, match="block_size: expected a power of two from 32 to 4096"):
        codebook("af4", 63)


@pytest.mark.parametrize("block_size", [32, 64, 1024])
def test_tabulated_theory_is_what_is_computed(block_size) -> None:
    """The iteration ends when no level moves by 1e-10, so one step more or less may be taken."""
    from nf4.error import tabulate, tabulated

    table = tabulate.compute([block_size])
    for name in COMPUTED:
        found = table["levels"].pop(tabulated.key(name, block_size))
        assert codebook(name, block_size) == pytest.approx(found, abs=2e-10, rel=0)
    for name in CODEBOOKS:
        for double_quant in (False, True) if name == "nf4" else (False,):
            found = table["errors"].pop(tabulated.key(name, block_size, double_quant))
            held = tabulated.errors(name, block_size, double_quant)
            assert held == pytest.approx(found, abs=0, rel=1e-9)
            e = nf4.expected_error(block_size, double_quant, name)
            assert (e.mse, e.mae, e.max_abs) == held and e.relative == e.rmse == e.mse**0.5
    assert table == {"levels": {}, "errors": {}}


def test_all_that_a_report_compares_is_tabulated(monkeypatch) -> None:
    from nf4.error import codebooks, tabulate, tabulated, theory
    from nf4.error.schemes import compared

    def refuse(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(theory, "_expected", refuse)
    monkeypatch.setattr(codebooks, "compute_codebook", refuse)
    known = [scheme.expected() for scheme in compared() if scheme.scale == "absmax"]
    assert len(known) == 80 and None not in known
    text = (Path(tabulated.__file__).parent / tabulated.FILE).read_text(encoding="utf-8")
    assert tabulate.as_text(json.loads(text)) == text
