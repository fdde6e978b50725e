"""(IA)³ on 4-bit and dense layers: values, gradients and files as PEFT's, merging, the scales."""

import copy
import re
import warnings

import pytest
import torch
from helpers import error
from kinds import TOKENS, logits, nf4_layers, randomize, with_kind
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

import nf4
from nf4.adapters.layer import AdaptedLayer
from nf4.layers.linear import is_conv1d, is_linear
from nf4.models.adapt import adapter_names
from nf4.models.kinds.ia3 import KNOWN_TARGETS


@pytest.fixture
def base(biased_llama) -> nn.Module:
    return biased_llama


def test_ia3_is_peft_s_in_values_gradients_and_files(base, tmp_path) -> None:
    model = with_kind(base, "ia3")
    scaled = {n.rpartition(".")[2]: m.named_adapters()["default"].of_inputs
              for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}  # fmt: skip
    assert scaled == {"k_proj": False, "v_proj": False, "down_proj": True}
    randomize(model)
    nf4.save_adapter(model, tmp_path / "ours")
    plain = nf4.merge(copy.deepcopy(base)) if nf4_layers(base) else copy.deepcopy(base)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "ours", is_trainable=True)
    assert error(logits(model), logits(theirs)) < 1e-5
    for one in (model, theirs):
        one(TOKENS, labels=TOKENS).loss.backward()
    for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
        ours = model.model.layers[1].get_submodule(name).adapters["default"].ia3_l.grad
        expected = theirs.base_model.model.model.layers[1].get_submodule(name)
        assert error(ours, expected.ia3_l["default"].grad.flatten()) < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(model))


def test_ia3_of_peft_opens_with_its_own_targets(base, tmp_path) -> None:
    plain = nf4.merge(copy.deepcopy(base)) if nf4_layers(base) else copy.deepcopy(base)
    config = IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
    theirs = get_peft_model(plain, config)
    for name, parameter in theirs.named_parameters():
        if "ia3_l" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    nf4.load_adapter(model, tmp_path / "theirs")
    assert error(logits(model), logits(theirs.eval())) < 1e-5


TARGETS = {
    "BERT": {},
    "RoBERTa": {},
    "DeBERTa": {},
    "DeBERTa-v2": {},
    "GPT-2": {},
    "GPT-J": {},
    "GPT-NeoX": {},
    "T5": {},
    "ALBERT": {},
    "BERT, dense": {"target_modules": ["key", "dense"], "feedforward_modules": ["output.dense"]},
    "Llama, one": {
        "target_modules": ["k_proj", "down_proj"],
        "feedforward_modules": ["layers.0.mlp.down_proj"],
    },
}


@pytest.mark.parametrize("name", TARGETS)
def test_ia3_s_files_open_in_peft(name, tmp_path) -> None:
    from architectures import logits, make

    options, name = TARGETS[name], name.partition(",")[0]
    model = nf4.add_ia3(make(name), **options)
    randomize(model)
    nf4.save_adapter(model, tmp_path / "ours")
    with warnings.catch_warnings(action="ignore"):  # of fan_in_fan_out, which PEFT sees to itself
        theirs = PeftModel.from_pretrained(make(name), tmp_path / "ours").eval()
    assert error(logits(model, name), logits(theirs, name)) < 1e-5
    again = make(name)
    nf4.load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again, name), logits(model, name))


def test_feedforward_list_means_no_other_layer_s_end(tmp_path) -> None:
    model = nn.ModuleDict({"o": nn.Linear(8, 6), "xo": nn.Linear(8, 6)})
    nf4.add_ia3(model, ["o", "xo"], ["o"])
    nf4.save_adapter(model, tmp_path / "ours")
    plain = nn.ModuleDict({"o": nn.Linear(8, 6), "xo": nn.Linear(8, 6)})
    theirs = PeftModel.from_pretrained(plain, tmp_path / "ours").base_model.model
    assert theirs["o"].is_feedforward and not theirs["xo"].is_feedforward


def test_feedforward_expression_names_layers_alone_a_second_time(base) -> None:
    model = copy.deepcopy(base)
    for name in ("a", "b"):
        nf4.add_ia3(model, r".*(k_proj|down_proj).*", r".*down_proj.*", adapter_name=name)
    assert adapter_names(model) == ["a", "b"]


@pytest.mark.parametrize("double_quant", [False, True])
def test_ia3_of_outputs_merges_into_the_scales(double_quant, tiny_llama) -> None:
    model = nf4.quantize_model(tiny_llama(attention_bias=True).eval(), double_quant=double_quant)
    nf4.add_ia3(model)
    randomize(model)
    layer = model.model.layers[0].self_attn.k_proj
    layer.adapters["default"].ia3_l.data[:3] = torch.tensor([0.0, -1.5, 2.0])
    expected, packed = logits(model), layer.packed.clone()
    rows = []
    merged = nf4.merge(model, requantize="exact", report=rows.append)
    attention, mlp = merged.model.layers[0].self_attn, merged.model.layers[0].mlp
    assert type(attention.k_proj) is nf4.LinearNF4 and torch.equal(attention.k_proj.packed, packed)
    assert not attention.k_proj.double_quant
    assert type(mlp.down_proj) is nn.Linear, "factors of inputs have no place in scales"
    assert type(mlp.up_proj) is nf4.LinearNF4 and mlp.up_proj.double_quant == double_quant
    assert error(logits(merged), expected) < 1e-5
    assert all(row.relative < 1e-6 for row in rows) and len(rows) == 6


def test_ia3_of_inputs_is_requantized_on_request(tiny_llama) -> None:
    model = nf4.add_ia3(nf4.quantize_model(tiny_llama().eval()))
    randomize(model)
    expected, rows = logits(model), []
    merged = nf4.merge(model, requantize=True, report=rows.append)
    assert len(nf4_layers(merged)) == 14
    assert 1e-3 < error(logits(merged), expected) < 0.3
    errors = {row.name.rpartition(".")[2]: row.relative for row in rows}
    assert errors["k_proj"] < 1e-6 and 0.02 < errors["down_proj"] < 0.2


def test_lora_is_made_dense_where_exact_four_bits_are_wanted(tiny_llama) -> None:
    model = nf4.add_lora(nf4.quantize_model(tiny_llama().eval()), r=2, target_modules=["q_proj"])
    randomize(model)
    expected = logits(model)
    merged = nf4.merge(model, requantize="exact")
    attention = merged.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear and type(attention.k_proj) is nf4.LinearNF4
    assert error(logits(merged), expected) < 1e-5


def test_ia3_in_bf16_rounds_as_peft_does(tiny_llama, tmp_path) -> None:
    model = nf4.add_ia3(nf4.quantize_model(tiny_llama().bfloat16().eval()))
    randomize(model)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, 160, dtype=torch.bfloat16)
    factor = layer.adapters["default"].ia3_l
    assert layer(x).dtype == torch.bfloat16 and factor.dtype == torch.float32
    assert torch.equal(layer(x), nf4.linear((x * factor).to(torch.bfloat16), layer.weight))


@pytest.mark.parametrize("kind", KNOWN_TARGETS)
def test_known_targets_are_linear_layers_of_their_model(kind) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    modules = dict(model.named_modules())
    for pattern in KNOWN_TARGETS[kind]:
        named = [modules[name] for name in modules if re.fullmatch(pattern, name)]
        assert len(named) >= {"albert": 1, "bloom": 2}.get(kind, 6)
        assert all(is_linear(module) or is_conv1d(module) for module in named)
