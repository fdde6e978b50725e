"""Adapters of a model by name: kinds, choice, files; against PEFT on dense."""

import copy

import pytest
import torch
from helpers import error
from kinds import TOKENS, logits, lora_layers, randomize, with_lora
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import nf4
import nf4.integrations.peft
from nf4.models.adapt import adapter_names

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora_dropout": {"use_dora": True, "lora_dropout": 0.2},
}


@pytest.fixture
def base(tiny_llama) -> nn.Module:
    return nf4.quantize_model(tiny_llama().eval())


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_kind_is_peft_s_in_values_gradients_and_files(options, base, tmp_path) -> None:
    model = with_lora(base, **options)
    assert error(logits(model), logits(base)) < 1e-6
    randomize(model)
    nf4.save_adapter(model, tmp_path / "ours")
    dense = nf4.merge(copy.deepcopy(base)).eval()
    theirs = PeftModel.from_pretrained(dense, tmp_path / "ours", is_trainable=True).eval()
    assert error(logits(model), logits(theirs)) < 1e-5
    if not options.get("lora_dropout"):
        for one in (model, theirs):
            one.train()
            one(TOKENS, labels=TOKENS).loss.backward()
            one.eval()
        layer = model.model.layers[1].mlp.up_proj
        expected = theirs.base_model.model.model.layers[1].mlp.up_proj
        assert error(layer.lora_A.grad, expected.lora_A.default.weight.grad) < 1e-4
        assert error(layer.lora_B.grad, expected.lora_B.default.weight.grad) < 1e-4
        if options.get("use_dora"):
            grad = expected.lora_magnitude_vector.default.weight.grad
            assert error(layer.lora_magnitude.grad, grad) < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(model))
    merged = nf4.merge(copy.deepcopy(model))
    assert error(logits(merged), logits(model)) < 1e-4
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    kinds = {n.rpartition(".")[2] for n in names}
    assert kinds == {"lora_A", "lora_B"} | ({"lora_magnitude"} if "use_dora" in options else set())


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_train_and_are_saved_as_peft_does(bias, tiny_llama, tmp_path) -> None:
    base = nf4.quantize_model(tiny_llama(attention_bias=True, mlp_bias=True).eval())
    targets = ["q_proj", "up_proj"]
    model = with_lora(base, target_modules=targets, bias=bias)
    theirs = get_peft_model(
        nf4.merge(copy.deepcopy(base)), LoraConfig(r=4, target_modules=targets, bias=bias)
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    expected = {
        n.removeprefix("base_model.model.").replace("base_layer.", "")
        for n, p in theirs.named_parameters()
        if p.requires_grad and n.endswith("bias")
    }
    assert trained == expected and trained
    randomize(model)
    for name in trained:
        model.get_parameter(name).data += 0.1
    nf4.save_adapter(model, tmp_path / "ours")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    again_trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert again_trained == {n for n, p in model.named_parameters() if p.requires_grad}
    opened = PeftModel.from_pretrained(nf4.merge(copy.deepcopy(base)), tmp_path / "ours").eval()
    assert error(logits(opened), logits(model)) < 1e-5
    opened.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="bias: expected one adapter for a model that trains bias"):
        nf4.add_lora(model, adapter_name="second")
    with pytest.raises(ValueError, match="expected bias='none' beside other adapters"):
        nf4.load_adapter(base, tmp_path / "ours", "beside")
    with pytest.raises(ValueError, match="bias: expected none, lora_only or all, got 'some'"):
        nf4.add_lora(base, bias="some")


def test_dropout_of_dora_drops_in_training_only(base) -> None:
    model = with_lora(base, use_dora=True, lora_dropout=0.5)
    randomize(model)
    once = logits(model)
    assert torch.equal(logits(model), once)
    model.train()
    assert error(logits(model), once) > 1e-3


@pytest.fixture
def two(base) -> nn.Module:
    """A model with adapters "en" on all layers and "fr", a DoRA one, on some."""
    model = with_lora(base, adapter_name="en")
    nf4.add_lora(model, r=2, target_modules=["q_proj", "up_proj"], adapter_name="fr", use_dora=True)
    randomize(model, "en")
    randomize(model, "fr")
    return model


def test_adapters_are_chosen_by_name(two, base) -> None:
    assert adapter_names(two) == ["en", "fr"]
    trained = {n for n, p in two.named_parameters() if p.requires_grad}
    assert trained and all(".adapters.fr.lora_" in name for name in trained)
    fr = logits(two)
    nf4.set_adapter(two, "en")
    en = logits(two)
    trained = {n for n, p in two.named_parameters() if p.requires_grad}
    assert trained and all(".adapters.en.lora_" in name for name in trained)
    nf4.set_adapter(two, ["en", "fr"])
    both = logits(two)
    nf4.set_adapter(two, None)
    assert torch.equal(logits(two), logits(base))
    assert not any(p.requires_grad for p in two.parameters())
    nf4.set_adapter(two, "en")
    with nf4.disable_adapter(two):
        assert torch.equal(logits(two), logits(base))
    assert torch.equal(logits(two), en)
    distinct = [fr, en, both, logits(base)]
    assert all(error(a, b) > 1e-3 for i, a in enumerate(distinct) for b in distinct[:i])


def test_contexts_nest_and_end_as_they_began(two, base) -> None:
    nf4.set_adapter(two, "fr")
    fr = logits(two)
    with nf4.disable_adapter(two):
        nf4.set_adapter(two, "en")
        assert torch.equal(logits(two), logits(base))
    en = logits(two)
    assert error(en, fr) > 1e-3
    with nf4.mixed_batch(two, ["fr", "fr"]):
        with nf4.mixed_batch(two, ["en", "en"]):
            assert error(logits(two), en) < 1e-5
        assert error(logits(two), fr) < 1e-5
        with nf4.disable_adapter(two):
            assert torch.equal(logits(two), logits(base))
    assert torch.equal(logits(two), en)
    nf4.set_adapter(two, ["en", "en"])
    assert torch.equal(logits(two), en)


def test_adapters_by_sample_are_refused_where_samples_are_not_seen(two) -> None:
    two.train()
    with pytest.raises(ValueError, match="expected one in eval mode for adapters by sample"):
        nf4.mixed_batch(two, ["en"]).__enter__()
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_local_experts=2)
    model = nf4.add_lora(nf4.quantize_model(MixtralForCausalLM(config)), r=2).eval()
    with pytest.raises(ValueError, match="mlp.experts: expected layers that see whole samples"):
        nf4.mixed_batch(model, ["default"]).__enter__()


def test_dora_heeds_small_lengths_and_autocast() -> None:
    layer = nf4.QLoRALinear(96, 80, r=4, use_dora=True, dtype=torch.bfloat16)
    x = torch.randn(64, 96, dtype=torch.bfloat16)
    once = layer(x)
    layer.lora_magnitude.data *= 1.0019
    assert (layer(x) != once).float().mean() > 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16


def test_adapters_of_a_batch_s_samples(two) -> None:
    expected = {}
    for name in (None, "en", "fr"):
        nf4.set_adapter(two, name)
        expected[name] = logits(two)
    nf4.set_adapter(two, ["en", "fr"])
    for names in (["fr", "en"], [None, "fr"], ["en", "en"]):
        with nf4.mixed_batch(two, names):
            mixed = logits(two)
        for sample, name in enumerate(names):
            assert error(mixed[sample], expected[name][sample]) < 1e-5
    with nf4.mixed_batch(two, ["fr", "en"]):
        two(TOKENS, labels=TOKENS).loss.backward()
    layer = two.model.layers[0].mlp.up_proj.named_adapters()
    assert all(layer[name].lora_B.grad.abs().max() > 0 for name in ("en", "fr"))
    with (
        nf4.mixed_batch(two, ["en"]),
        pytest.raises(ValueError, match="one adapter for each of 2 samples, got 1"),
    ):
        logits(two)
    nf4.set_adapter(two, None)
    assert torch.equal(logits(two), expected[None])


def test_each_adapter_has_its_files(two, base, tmp_path) -> None:
    for name in ("en", "fr"):
        nf4.save_adapter(two, tmp_path / name, name)
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "en", "en")
    nf4.load_adapter(again, tmp_path / "fr", "fr")
    for name in ("en", "fr", ["en", "fr"]):
        for model in (two, again):
            nf4.set_adapter(model, name)
        assert error(logits(again), logits(two)) < 1e-6
    with pytest.raises(ValueError, match="adapter_name: expected one of en, fr, got None"):
        nf4.save_adapter(two, tmp_path / "both")
    with pytest.raises(ValueError, match="expected a layer without adapter 'fr', it has one"):
        nf4.load_adapter(again, tmp_path / "fr", "fr")
    nf4.load_adapter(again, tmp_path / "fr")
    assert adapter_names(again) == ["default"]
    nf4.set_adapter(two, "fr")
    assert error(logits(again), logits(two)) < 1e-6
    theirs = PeftModel.from_pretrained(nf4.merge(copy.deepcopy(base)), tmp_path / "fr").eval()
    assert error(logits(theirs), logits(two)) < 1e-5


def test_several_adapters_merge_as_they_compute(base) -> None:
    model = with_lora(base, adapter_name="a")
    nf4.add_lora(model, r=2, adapter_name="b")
    randomize(model, "a")
    randomize(model, "b")
    nf4.set_adapter(model, ["a", "b"])
    assert error(logits(nf4.merge(copy.deepcopy(model))), logits(model)) < 1e-4
    state = model.state_dict()
    twin = nf4.add_lora(with_lora(base, adapter_name="a"), r=2, adapter_name="b")
    twin.load_state_dict(state)
    nf4.set_adapter(twin, ["a", "b"])
    assert torch.equal(logits(twin), logits(model))


BAD_CHOICES = {
    "unknown": (lambda m: nf4.set_adapter(m, "de"), ValueError, "expected one of en, fr, got 'de'"),
    "one_unknown": (lambda m: nf4.set_adapter(m, ["en", "de"]), ValueError, "got 'de'"),
    "number": (lambda m: nf4.set_adapter(m, [1]), TypeError, "adapter_name: expected names, got 1"),
    "mixed": (lambda m: nf4.mixed_batch(m, ["de"]).__enter__(), ValueError, "got 'de'"),
    "taken": (lambda m: nf4.add_lora(m, adapter_name="en"), ValueError, "without adapter 'en', go"),
    "dotted": (lambda m: nf4.add_lora(m, adapter_name="a.b"), ValueError, "name without dots"),
    "unnamed": (lambda m: nf4.add_lora(m, adapter_name=3), TypeError, "expected a string, got int"),
    "reserved": (
        lambda m: nf4.add_lora(m, adapter_name="items"),
        ValueError,
        "ModuleDict can h",
    ),
    "mixed_text": (lambda m: nf4.mixed_batch(m, "enfr").__enter__(), TypeError, "a list of names"),
    "mixed_number": (
        lambda m: nf4.mixed_batch(m, 5).__enter__(),
        TypeError,
        "names: expected",
    ),
    "dora": (lambda m: nf4.add_lora(m, use_dora="yes"), TypeError, "use_dora: expected a bool"),
    "pissa": (
        lambda m: nf4.add_lora(m, adapter_name="x", init_lora_weights="pissa"),
        ValueError,
        "expected a layer without adapter for pissa",
    ),
    "start": (
        lambda m: nf4.add_lora(m, adapter_name="x", init_lora_weights="eva"),
        ValueError,
        "init_lora_weights: expected True or one of pissa, loftq, got 'eva'",
    ),
    "save": (lambda m: nf4.save_adapter(m, "/nowhere/x", "de"), ValueError, "en, fr, got 'de'"),
    "requantize": (lambda m: nf4.merge(m, requantize=1), TypeError, "requantize: expected a bool"),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CHOICES.values(), ids=BAD_CHOICES.keys())
def test_bad_choice_is_refused_and_nothing_changed(call, kind, message, two) -> None:
    before = {n: (p.requires_grad, p.clone()) for n, p in two.named_parameters()}
    once = logits(two)
    with pytest.raises(kind, match=message):
        call(two)
    after = {n: (p.requires_grad, p) for n, p in two.named_parameters()}
    assert before.keys() == after.keys()
    for name, (trained, value) in before.items():
        assert after[name][0] == trained and torch.equal(after[name][1], value)
    assert torch.equal(logits(two), once)


def test_set_adapter_of_a_model_without_one_says_so(base) -> None:
    with pytest.raises(ValueError, match="none: there is no adapter, got 'en'"):
        nf4.set_adapter(base, "en")


def test_models_of_peft_are_left_to_peft(base, tmp_path) -> None:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules="all-linear"))
    once = logits(model.eval())
    for call in (
        lambda: nf4.merge(model),
        lambda: nf4.add_lora(model),
        lambda: nf4.save_adapter(model, tmp_path / "x"),
        lambda: nf4.load_adapter(model, tmp_path),
        lambda: nf4.quantize_model(model),
    ):
        with pytest.raises(ValueError, match="expected a model without PEFT's adapters, got PeftM"):
            call()
    assert torch.equal(logits(model), once)


def test_dora_compiles_without_graph_breaks(backend) -> None:
    layer = nf4.QLoRALinear(96, 80, r=4, use_dora=True)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 96)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert error(compiled(x), layer(x)) < 1e-5


def test_adapters_of_peft_and_ours_are_the_same_computation(base, tmp_path) -> None:
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    )
    theirs.save_pretrained(tmp_path / "peft")
    ours = copy.deepcopy(base)
    nf4.load_adapter(ours, tmp_path / "peft")
    assert error(logits(ours), logits(theirs.eval())) < 1e-5


def test_parameters_of_adapters_come_by_hooks_as_when_they_are_offloaded(base) -> None:
    from accelerate import cpu_offload

    model = with_lora(base)
    randomize(model)
    expected = logits(model)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert lora_layers(offloaded)[0].lora_A.is_meta
    assert error(logits(offloaded), expected) < 1e-6
