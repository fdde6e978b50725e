"""PEFT's (IA)³, PiSSA and LoftQ on quantized layers, and merging into four bits."""

import copy

import pytest
import torch
from helpers import error
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

import nf4
from nf4.integrations.peft import (
    NF4IA3Linear,
    NF4LoraLinear,
    merge_and_requantize,
    replace_lora_weights_loftq,
)

TOKENS = torch.arange(24).view(2, 12) % 320
TARGETS = {
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def bases(tiny_llama) -> tuple[nn.Module, nn.Module]:
    """A quantized model, and the same weights dense; one layer has a bias."""
    dense = tiny_llama(attention_bias=True).eval()
    for layer in dense.model.layers:
        nn.init.normal_(layer.self_attn.k_proj.bias)
    quantized = nf4.quantize_model(dense)
    return quantized, nf4.merge(copy.deepcopy(quantized)).eval()


def with_ia3(base: nn.Module, *names: str, **options) -> PeftModel:
    """Put (IA)³ adapters with factors around one on a copy of a model."""
    names = names or ("default",)
    config = IA3Config(**{**TARGETS, **options})
    model = get_peft_model(copy.deepcopy(base), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, IA3Config(**{**TARGETS, **options}))
    for key, parameter in model.named_parameters():
        if "ia3_l" in key:
            torch.manual_seed(sum(map(ord, key)))
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def test_ia3_is_that_of_dense_weights(bases, tmp_path) -> None:
    ours, theirs = (with_ia3(base) for base in bases)
    assert sum(isinstance(m, NF4IA3Linear) for m in ours.modules()) == 6
    assert error(logits(ours), logits(bases[1])) > 0.01
    assert error(logits(ours), logits(theirs)) < 1e-5
    for model in (ours, theirs):
        model.train()
        model(TOKENS, labels=TOKENS).loss.backward()
        model.eval()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert grads.keys() == expected.keys() and len(grads) == 6
    assert all(error(grads[name], grad) < 1e-4 for name, grad in expected.items())
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    crossed = PeftModel.from_pretrained(copy.deepcopy(bases[0]), tmp_path / "theirs").eval()
    assert error(logits(crossed), logits(theirs)) < 1e-5
    crossed = PeftModel.from_pretrained(copy.deepcopy(bases[1]), tmp_path / "ours").eval()
    assert error(logits(crossed), logits(ours)) < 1e-5


def test_ia3_starts_at_the_base(bases) -> None:
    model = get_peft_model(copy.deepcopy(bases[0]), IA3Config(**TARGETS))
    assert error(logits(model), logits(bases[0])) < 1e-6


def test_ia3_adapters_are_switched_disabled_stacked_and_merged(bases) -> None:
    models = [with_ia3(base, "default", "second") for base in bases]
    ours, theirs = models
    for names in ("default", "second", ["default", "second"]):
        for model in models:
            model.base_model.set_adapter(names)
        assert error(logits(ours), logits(theirs)) < 1e-5
    both = logits(ours)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(bases[0]))
    ours.merge_adapter()
    assert error(logits(ours), both) < 1e-4
    with ours.disable_adapter():  # which unmerges
        assert torch.equal(logits(ours), logits(bases[0]))
    ours.base_model.set_adapter(["default", "second"])
    merged = ours.merge_and_unload(safe_merge=True)
    assert error(logits(merged), both) < 1e-4
    for name in ("k_proj", "q_proj"):  # what nf4.merge leaves, with an adapter on it or not
        assert type(merged.model.layers[0].self_attn.get_submodule(name)) is nn.Linear
    unloaded = theirs.unload()
    assert error(logits(unloaded), logits(bases[0])) < 1e-5
    assert torch.equal(logits(with_ia3(bases[0]).unload()), logits(bases[0]))


def test_ia3_refuses_to_merge_what_is_not_finite(bases) -> None:
    model = with_ia3(bases[0])
    layer = next(m for m in model.modules() if isinstance(m, NF4IA3Linear))
    layer.ia3_l["default"].data[0] = torch.inf
    with pytest.raises(ValueError, match="adapter default: expected finite weights"):
        layer.merge(safe_merge=True)
    assert not layer.merged and "ia3.NF4IA3Linear" in repr(layer)


# --- starts and merging


def with_lora(base: nn.Module, **options) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": "all-linear", **options})
    return get_peft_model(copy.deepcopy(base), config).eval()


def test_pissa_changes_the_base_once_and_its_files_do_so_again(bases, tmp_path) -> None:
    model = with_lora(bases[0], init_lora_weights="pissa")
    ours = nf4.add_lora(copy.deepcopy(bases[0]), r=8, lora_alpha=8, init_lora_weights="pissa")
    assert error(logits(model), logits(ours)) < 1e-5
    assert error(logits(model), logits(bases[0])) < 0.3
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data *= 1.1
    model.save_pretrained(tmp_path / "pissa")
    again = PeftModel.from_pretrained(copy.deepcopy(bases[0]), tmp_path / "pissa").eval()
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="for a layer's only adapter, got it beside default"):
        model.add_adapter("second", LoraConfig(r=2, init_lora_weights="pissa"))


def test_loftq_starts_nearer_to_the_dense_model(bases, tiny_llama, tmp_path) -> None:
    dense = tiny_llama(attention_bias=True).eval()
    base = nf4.quantize_model(copy.deepcopy(dense))
    model, plain = with_lora(base), with_lora(base)
    replace_lora_weights_loftq(model, dense)
    assert error(logits(model), logits(dense)) < error(logits(plain), logits(dense))
    ours = nf4.add_lora(
        copy.deepcopy(base), r=8, lora_alpha=8, init_lora_weights="loftq", original=dense
    )
    assert error(logits(model), logits(ours)) < 1e-5
    model.save_pretrained(tmp_path / "loftq")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "loftq").eval()
    assert error(logits(again), logits(model)) < 1e-6
    with pytest.raises(ValueError, match="adapter_name: expected that of an adapter, got 'x'"):
        replace_lora_weights_loftq(model, dense, "x")
    with pytest.raises(TypeError, match="model: expected a PeftModel, got LlamaForCausalLM"):
        replace_lora_weights_loftq(base, dense)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merge_into_four_bits_reports_the_drift(use_dora, bases) -> None:
    model = with_lora(bases[0], use_dora=use_dora, init_lora_weights=False)
    before, rows = logits(model), []
    exact = {
        n: m.exact_merged_weight() for n, m in model.named_modules() if isinstance(m, NF4LoraLinear)
    }
    merged = merge_and_requantize(model, rows.append)
    assert isinstance(merged.model.layers[0].mlp.up_proj, nf4.LinearNF4)
    assert error(logits(merged), before) < 0.3
    assert [row.name for row in rows] == list(exact)
    row = next(row for row in rows if row.name.endswith("1.mlp.up_proj"))
    w = nf4.dequantize(merged.model.layers[1].mlp.up_proj.weight)
    assert row.relative == pytest.approx(error(w, exact[row.name]), rel=1e-3)
    assert 0.05 < row.relative < 0.15
    with pytest.raises(ValueError, match="expected LoRA adapters on LinearNF4 layers, found none"):
        merge_and_requantize(with_lora(bases[1]))


def test_merge_into_four_bits_loses_no_adapter_of_a_dense_layer(bases) -> None:
    model = with_lora(bases[0], target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head: expected adapters on LinearNF4 layers alone"):
        merge_and_requantize(model)


def test_merge_into_four_bits_of_what_is_not_finite_changes_nothing(bases) -> None:
    model = with_lora(bases[0], init_lora_weights=False)
    once = logits(model)
    layer = [m for m in model.modules() if isinstance(m, NF4LoraLinear)][-1]
    value = layer.lora_A["default"].weight.data[0, 0].clone()
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="down_proj: expected base plus adapter of finite values"):
        merge_and_requantize(model)
    layer.lora_A["default"].weight.data[0, 0] = value
    assert torch.equal(logits(model), once)


def test_all_linear_leaves_out_the_output_layer_in_4_bits_too(tiny_llama) -> None:
    base = nf4.quantize_model(tiny_llama(), skip_modules=(), quantize_embeddings=True)
    model = with_lora(base)
    assert type(model.base_model.model.lm_head) is nf4.LinearNF4
    with pytest.raises(ValueError, match="modules_to_save: expected .*, got a LinearNF4"):
        with_lora(base, modules_to_save=["lm_head"])


def test_adapters_with_and_without_dora_stack_as_peft_s_do(bases) -> None:
    models = [with_lora(base, init_lora_weights=False) for base in bases]
    for model in models:
        torch.manual_seed(5)
        config = LoraConfig(
            r=3, target_modules="all-linear", use_dora=True, init_lora_weights=False
        )
        model.add_adapter("dora", config)
    state = {k: v for k, v in models[0].state_dict().items() if "lora_" in k}
    for key in (k for k in state if "magnitude" in k):
        state[key] = state[key] * 1.2
    for model in models:
        model.load_state_dict(state, strict=False)
    for names in (["default", "dora"], ["dora", "default"]):
        for model in models:
            model.base_model.set_adapter(names)
        assert error(logits(models[0]), logits(models[1])) < 1e-5
    once = logits(models[0])
    assert error(logits(models[0].merge_and_unload()), once) < 1e-4


def test_dense_merge_knows_its_error(bases) -> None:
    model = with_lora(bases[0].bfloat16(), init_lora_weights=False)
    layer = next(m for m in model.modules() if isinstance(m, NF4LoraLinear))
    assert layer.merge_error is None
    layer.merge()
    assert 0 < layer.merge_error.relative < 0.004 and layer.merge_error.of_update < 0.1


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_train_with_the_adapter(bias, bases, tmp_path) -> None:
    ours, theirs = (with_lora(base, bias=bias, target_modules=["k_proj"]) for base in bases)
    for model in (ours, theirs):
        model.train()
        model(TOKENS, labels=TOKENS).loss.backward()
        model.eval()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys() and any("k_proj.base_layer.bias" in n for n in grads)
    assert all(error(grads[n], g) < 1e-3 for n, g in expected.items() if "lora_A" not in n)
    with torch.no_grad():
        for parameter in (p for p in ours.parameters() if p.grad is not None):
            parameter += 0.1
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(bases[0]), tmp_path).eval()
    assert error(logits(again), logits(ours)) < 1e-6
