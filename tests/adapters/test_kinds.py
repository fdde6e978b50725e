"""Adapters of every kind, on 4-bit and dense layers: one mechanism, and a fifth kind in a file."""

import copy
import pickle

import pytest
import torch
from helpers import error
from kinds import ADD, TOKENS, logits, randomize, with_kind
from torch import nn

import nf4
from nf4.adapters.layer import adapted_layers
from nf4.models.adapt import adapter_names


@pytest.fixture
def base(biased_llama) -> nn.Module:
    return biased_llama


@pytest.fixture(params=ADD)
def kind(request) -> str:
    return request.param


def test_kind_starts_at_the_base_trains_only_itself_and_switches_off(kind, base) -> None:
    model = with_kind(base, kind).train()
    assert error(logits(model), logits(base)) < 1e-6
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    adapters = [layer.named_adapters()["default"] for layer in adapted_layers(model)]
    own = [p for adapter in adapters for p in adapter.parameters()]
    assert {id(model.get_parameter(n)) for n in trained} == set(map(id, own)) and trained
    optimizer = torch.optim.Adam(own, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    model.eval()
    tuned = logits(model)
    assert error(tuned, logits(base)) > 1e-3
    with nf4.disable_adapter(model):
        assert torch.equal(logits(model), logits(base))
    nf4.set_adapter(model, None)
    assert torch.equal(logits(model), logits(base))
    assert not any(p.requires_grad for p in model.parameters())
    nf4.set_adapter(model, "default")
    assert torch.equal(logits(model), tuned)


def test_kind_has_files_a_state_dict_and_copies(kind, base, tmp_path) -> None:
    model = with_kind(base, kind)
    randomize(model)
    nf4.save_adapter(model, tmp_path / "saved")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    # The same layers take the file's values
    layers, other = list(map(id, again.modules())), with_kind(base, kind)
    nf4.load_adapter(other, tmp_path / "saved")
    nf4.load_adapter(again, tmp_path / "saved")
    assert list(map(id, again.modules())) == layers
    assert torch.equal(logits(other), logits(model))
    twin = with_kind(base, kind)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    assert "default" in repr(model) or "r=4" in repr(model)


@pytest.mark.parametrize("name", ["lora", "adamix"])
def test_a_seed_gives_dense_and_4_bit_layers_one_start(name, tiny_llama) -> None:
    dense, quantized = (
        with_kind(m, name) for m in (tiny_llama(), nf4.quantize_model(tiny_llama()))
    )
    pairs = list(zip(adapted_layers(dense), adapted_layers(quantized), strict=True))
    assert len(pairs) == 14
    for one, other in pairs:
        a, b = (layer.named_adapters()["default"].lora_A for layer in (one, other))
        assert torch.equal(a, b)


def test_kind_merges_to_within_rounding(kind, base) -> None:
    model = with_kind(base, kind).train()
    randomize(model)
    rows = []
    merged = nf4.merge(copy.deepcopy(model), report=rows.append)
    model.eval()
    assert error(logits(merged.eval()), logits(model)) < 1e-5
    assert error(logits(model), logits(base)) > 1e-3
    assert not adapted_layers(merged)
    assert all(type(m) is nn.Linear for n, m in merged.named_modules() if n.endswith("_proj"))
    assert rows and all(row.relative < 1e-6 for row in rows)


def test_kinds_stack_on_a_layer_and_merge_in_turn(base) -> None:
    model = copy.deepcopy(base)
    for name in ("lora", "ia3", "adamix", "fifth", "dora"):
        ADD[name](model, adapter_name=name)
        randomize(model, name)
    assert sorted(adapter_names(model)) == ["adamix", "dora", "fifth", "ia3", "lora"]
    alone = {}
    for name in adapter_names(model):
        nf4.set_adapter(model, name)
        alone[name] = logits(model)
    assert all(error(a, b) > 1e-3 for a in alone.values() for b in alone.values() if a is not b)
    for names in (["lora", "ia3"], ["ia3", "lora"], ["fifth", "ia3", "adamix", "dora", "lora"]):
        nf4.set_adapter(model, names)
        merged = nf4.merge(copy.deepcopy(model))
        assert error(logits(merged), logits(model)) < 1e-5
    nf4.set_adapter(model, ["lora", "ia3"])
    one = logits(model)
    nf4.set_adapter(model, ["ia3", "lora"])
    assert error(logits(model), one) > 1e-4, "the last is outermost"


def test_kinds_by_sample(base) -> None:
    model = copy.deepcopy(base)
    for name in ("lora", "ia3", "fifth"):
        ADD[name](model, adapter_name=name)
        randomize(model, name)
    expected = {}
    for name in (None, "lora", "ia3", "fifth"):
        nf4.set_adapter(model, name)
        expected[name] = logits(model)
    for names in (["ia3", "lora"], [None, "ia3"], ["fifth", "fifth"]):
        with nf4.mixed_batch(model, names):
            mixed = logits(model)
        for sample, name in enumerate(names):
            assert error(mixed[sample], expected[name][sample]) < 1e-5


def test_adapters_on_dense_layers_keep_names_and_modules(tiny_llama) -> None:
    model = tiny_llama()
    names, lm_head = list(model.state_dict()), model.lm_head
    nf4.add_lora(model, r=2)
    assert model.lm_head is lm_head, "the output layer is not adapted"
    assert [n for n in model.state_dict() if ".adapters." not in n] == names
    with pytest.raises(ValueError, match="expected a model without adapters, got them on model.la"):
        nf4.quantize_model(model)


def test_conv1d_is_adapted_dense_and_gives_itself_back(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=4)).eval()
    for add in (ADD["lora"], ADD["dora"], ADD["ia3"], ADD["adamix"]):
        model = add(copy.deepcopy(dense))
        randomize(model)
        assert error(logits(model), logits(dense)) > 1e-3
        merged = nf4.merge(copy.deepcopy(model))
        assert type(merged.transformer.h[0].attn.c_attn) is type(dense.transformer.h[0].attn.c_attn)
        assert error(logits(merged), logits(model)) < 1e-5
        assert merged.state_dict().keys() == dense.state_dict().keys()
