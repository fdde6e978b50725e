import math

import pytest
import torch
from torch import nn

import nf4
from nf4.error.measured import perplexity


def test_quantization_error_is_what_its_fields_say() -> None:
    w = torch.randn(40, 64)
    q = nf4.quantize(w)
    e = nf4.quantization_error(w, q)
    diff = (nf4.dequantize(q) - w).double()
    assert e.mse == pytest.approx(diff.square().mean().item(), rel=1e-6)
    assert e.rmse == pytest.approx(math.sqrt(e.mse))
    assert e.mae == pytest.approx(diff.abs().mean().item(), rel=1e-6)
    assert e.max_abs == pytest.approx(diff.abs().max().item(), rel=1e-6)
    assert e.relative == pytest.approx((diff.norm() / w.double().norm()).item(), rel=1e-6)
    assert e.sqnr_db == pytest.approx(-20 * math.log10(e.relative))


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_quantization_error_does_not_overflow(exponent) -> None:
    w = torch.randn(40, 64)
    unit, scaled = (
        nf4.quantization_error(v, nf4.quantize(v, double_quant=False))
        for v in (w, w * 2.0**exponent)
    )
    assert scaled.relative == pytest.approx(unit.relative, rel=1e-6)
    assert scaled.rmse == pytest.approx(unit.rmse * 2.0**exponent, rel=1e-6)
    assert scaled.max_abs == pytest.approx(unit.max_abs * 2.0**exponent, rel=1e-6)


@pytest.mark.parametrize("w", [torch.zeros(8, 64), torch.zeros(0, 64)], ids=["zeros", "empty"])
def test_quantization_error_without_signal(w) -> None:
    e = nf4.quantization_error(w, nf4.quantize(w))
    assert (e.mse, e.relative, e.sqnr_db) == (0, 0, math.inf)


def test_model_error_has_a_row_a_layer_and_changes_nothing(block) -> None:
    rows = nf4.model_error(block, block_size=32)
    assert [(r.name, r.kind, r.shape) for r in rows] == [
        ("up", "up", (160, 96)),
        ("down", "down", (96, 160)),
    ]
    assert all(0.05 < r.error.relative < 0.12 for r in rows)
    assert type(block.up) is nn.Linear


class Uniform(nn.Module):
    """A language model that finds every token equally likely, or knows the next one."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.knows = knows

    def forward(self, tokens):
        assert not self.training
        logits = torch.zeros(*tokens.shape, 50)
        if self.knows:
            logits[0, torch.arange(tokens.shape[1] - 1), tokens[0, 1:]] = 100
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize(("knows", "expected"), [(False, 50), (True, 1)])
def test_perplexity_of_known_models(knows, expected) -> None:
    seen = []
    model = Uniform(knows)
    found = perplexity(model, torch.randint(50, (3, 8)), lambda *a: seen.append(a))
    assert found == pytest.approx(expected, rel=1e-6)
    assert seen == [(1, 3), (2, 3), (3, 3)] and model.training


@pytest.mark.parametrize("shape", [(8,), (2, 1), (0, 8)], ids=str)
def test_perplexity_rejects_a_wrong_shape(shape) -> None:
    with pytest.raises(ValueError, match="windows: expected shape"):
        perplexity(Uniform(False), torch.zeros(shape, dtype=torch.int64))
