"""Merging adapters into a model's weights: its error, what it refuses and what stays tied."""

import pytest
import torch
from helpers import error
from kinds import lora_layers, randomize, with_lora
from torch import nn

import nf4


@pytest.fixture
def base(tiny_llama) -> nn.Module:
    return nf4.quantize_model(tiny_llama().eval())


@pytest.mark.parametrize("requantize", [False, True])
def test_merge_reports_its_error(requantize, base) -> None:
    model = with_lora(base.bfloat16())
    randomize(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nf4.QLoRALinear)}
    exact = {n: m.exact_merged_weight() for n, m in layers.items()}
    bare = {n: nf4.dequantize(m.weight, torch.float32) for n, m in layers.items()}
    del layers
    rows = []
    merged = nf4.merge(model, requantize=requantize, report=rows.append)
    assert [row.name for row in rows] == list(exact)
    for row in rows:
        layer = merged.get_submodule(row.name)
        assert isinstance(layer, nf4.LinearNF4) == requantize
        w = nf4.dequantize(layer.weight, torch.float32) if requantize else layer.weight.float()
        assert row.relative == pytest.approx(error(w, exact[row.name]), rel=1e-3)
        drift = (w - exact[row.name]).norm() / (exact[row.name] - bare[row.name]).norm()
        assert row.of_update == pytest.approx(drift.item(), rel=1e-3)
        assert (row.relative < 0.01) != requantize
    assert not lora_layers(merged)


def test_merge_of_what_adds_nothing_has_no_drift_to_report(base) -> None:
    rows = []
    nf4.merge(with_lora(base, target_modules=["q_proj"]), report=rows.append)
    assert all(row.relative == 0 and row.of_update != row.of_update for row in rows)


@pytest.mark.parametrize("value", [torch.nan, 1e30])
@pytest.mark.parametrize("requantize", [False, True])
def test_merge_of_what_is_not_finite_changes_nothing(requantize, value, base, tmp_path) -> None:
    model = with_lora(base, adapter_name="x")
    lora_layers(model)[-1].lora_B.data.fill_(value)
    lora_layers(model)[-1].lora_A.data.fill_(value)
    with pytest.raises(ValueError, match="down_proj: expected base plus adapter that torch"):
        nf4.merge(model, requantize=requantize)
    assert len(lora_layers(model)) == 14
    if value != value:
        with pytest.raises(ValueError, match="down_proj: expected an adapter of finite val"):
            nf4.save_adapter(model, tmp_path / "nan")


def test_layers_tied_to_each_other_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    nf4.quantize_model(model)
    assert model[0].packed is model[2].packed
    nf4.merge(model)
    assert model[0].weight is model[2].weight


def test_merge_on_meta_makes_each_layer_its_own(tiny_llama) -> None:
    with torch.device("meta"):
        model = nf4.quantize_model(tiny_llama(), quantize_embeddings=True)
    merged = nf4.merge(model)
    assert merged.model.layers[0].self_attn.q_proj.weight.shape == (64, 64)


def test_requantizing_needs_an_adapter(base) -> None:
    with pytest.raises(ValueError, match="4-bit layers with adapters to merge, found none"):
        nf4.merge(base, requantize=True)


def test_requantized_layers_without_adapter_stay(base) -> None:
    packed = base.model.layers[0].mlp.up_proj.packed
    merged = nf4.merge(with_lora(base, target_modules=["q_proj"]), requantize=True)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.packed, packed)
    assert type(merged.model.layers[0].self_attn.q_proj) is nf4.LinearNF4
