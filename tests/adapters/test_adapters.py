"""Adapters of a model by name: kinds, choice, starts, files, merging; against PEFT on dense."""

import copy

import pytest
import torch
from helpers import error
from kinds import TOKENS, logits, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
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


def adapted(model: nn.Module) -> list[nf4.QLoRALinear]:
    return [m for m in model.modules() if isinstance(m, nf4.QLoRALinear)]


@pytest.fixture
def base(tiny_llama) -> nn.Module:
    return nf4.quantize_model(tiny_llama().eval())


def with_lora(base: nn.Module, **options) -> nn.Module:
    torch.manual_seed(0)
    model = nf4.add_lora(copy.deepcopy(base), **{"r": 4, "lora_alpha": 8, **options})
    return model


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


# --- PiSSA and LoftQ


def weight_error(model: nn.Module, dense: nn.Module) -> float:
    """Return the relative distance of a model's merged weights from the dense model's."""
    name = "model.layers.1.mlp.up_proj"
    return error(model.get_submodule(name).merged_weight(), dense.get_submodule(name).weight)


@pytest.mark.parametrize("source", ["module", "state_dict", "folder"])
def test_loftq_starts_nearer_to_the_dense_model(source, base, tiny_llama, tmp_path) -> None:
    dense = tiny_llama().eval()
    original = {"module": dense, "state_dict": dense.state_dict(), "folder": tmp_path}[source]
    dense.save_pretrained(tmp_path)
    model = with_lora(base, r=16, init_lora_weights="loftq", original=original)
    plain = with_lora(base, r=16)
    assert weight_error(model, dense) < 0.75 * weight_error(plain, dense)
    assert error(logits(model), logits(dense)) < error(logits(plain), logits(dense))
    for ours, theirs in zip(adapted(model), adapted(plain), strict=True):
        assert torch.equal(ours.packed, theirs.packed), "the base stays"
    # The adapter fits any copy of the base
    nf4.save_adapter(model, tmp_path / "adapter")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_loftq_is_the_best_of_its_rank(base, tiny_llama) -> None:
    """No s B A of rank r is nearer to what quantization lost (Eckart and Young)."""
    dense = tiny_llama()
    layer = with_lora(base, init_lora_weights="loftq", original=dense).model.layers[0].mlp.up_proj
    lost = dense.model.layers[0].mlp.up_proj.weight - nf4.dequantize(layer.weight)
    singular = torch.linalg.svdvals(lost.double())
    left = lost - layer.scaling * layer.lora_B @ layer.lora_A
    assert left.norm().item() == pytest.approx(singular[4:].norm().item(), rel=1e-4)


def test_pissa_keeps_the_largest_directions_in_full(base, tiny_llama, tmp_path) -> None:
    dense = tiny_llama().eval()
    model = with_lora(base, r=8, init_lora_weights="pissa", original=dense)
    plain = with_lora(base, r=8)
    assert weight_error(model, dense) < weight_error(plain, dense)
    layer = model.model.layers[0].mlp.up_proj
    w = dense.model.layers[0].mlp.up_proj.weight
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    largest = u[:, :8] * s[:8] @ vh[:8]
    assert error(layer.scaling * layer.lora_B @ layer.lora_A, largest) < 1e-4
    assert error(nf4.dequantize(layer.weight), w - largest) < 0.2


def test_pissa_s_files_change_the_base_as_the_start_did(base, tmp_path) -> None:
    model = with_lora(base, init_lora_weights="pissa")
    randomize(model)
    nf4.save_adapter(model, tmp_path / "pissa")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "pissa")
    assert torch.equal(logits(again), logits(model))
    nf4.load_adapter(again, tmp_path / "pissa")  # the base is not changed twice
    assert torch.equal(logits(again), logits(model))
    nf4.save_adapter(with_lora(base), tmp_path / "plain")
    with pytest.raises(ValueError, match="expected a base as nf4.quantize_model .* by pissa"):
        nf4.load_adapter(again, tmp_path / "plain")
    assert torch.equal(logits(again), logits(model))


def test_conv1d_weights_are_turned(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    dense = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4)).eval()
    save_file({k: v.contiguous() for k, v in dense.state_dict().items() if "lm_head" not in k},
              tmp_path / "model.safetensors")  # fmt: skip
    model = nf4.quantize_model(copy.deepcopy(dense))
    targets = ["attn.c_proj", "c_fc"]  # 64x64, and 64x256
    model = nf4.add_lora(
        model, r=16, target_modules=targets, init_lora_weights="loftq", original=str(tmp_path)
    )
    for name in ("attn.c_proj", "mlp.c_fc"):
        layer = model.transformer.h[0].get_submodule(name)
        w = dense.transformer.h[0].get_submodule(name).weight.T
        assert error(layer.merged_weight(), w) < 0.8 * error(nf4.dequantize(layer.weight), w)


def other(tiny_llama) -> nn.Module:
    model = tiny_llama()
    nn.init.normal_(model.model.layers[1].mlp.down_proj.weight)
    return model


BAD_ORIGINALS = {
    "none": (lambda m: None, ValueError, "original: expected the weights before quantization"),
    "number": (lambda m: 3, TypeError, "original: expected a dense model, .* got int"),
    "empty": (lambda m: {}, ValueError, "expected a weight 'model.layers.0.*q_proj.weight', found"),
    "no_folder": (lambda m: "/nowhere", FileNotFoundError, "expected safetensors, found none at"),
    "another": (
        lambda m: other(m),
        ValueError,
        "expected in model.layers.1.mlp.down_proj.weight what was quantized, got another weight",
    ),
    "smaller": (
        lambda m: {**m().state_dict(), "model.layers.0.mlp.gate_proj.weight": torch.ones(96, 64)},
        ValueError,
        r"expected shape \(160, 64\) of .*gate_proj.weight, got \(96, 64\)",
    ),
}


@pytest.mark.parametrize(
    ("original", "kind", "message"), BAD_ORIGINALS.values(), ids=BAD_ORIGINALS.keys()
)
def test_bad_original_is_refused_before_anything_changes(
    original, kind, message, base, tiny_llama
) -> None:
    with pytest.raises(kind, match=message):
        nf4.add_lora(base, init_lora_weights="loftq", original=original(tiny_llama))
    with pytest.raises(ValueError, match="r: expected at most 32 for pissa on a weight 32x64"):
        nf4.add_lora(base, r=33, init_lora_weights="pissa")
    assert not adapted(base)


def test_truncated_original_is_named(base, tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="model.safetensors: expected a whole safetensors file"):
        nf4.add_lora(base, init_lora_weights="loftq", original=tmp_path)
    assert not adapted(base)


def test_pissa_from_the_original_needs_it_again(base, tiny_llama, tmp_path) -> None:
    dense = tiny_llama().eval()
    model = with_lora(base, init_lora_weights="pissa", original=dense)
    randomize(model)
    nf4.save_adapter(model, tmp_path / "pissa")
    again = copy.deepcopy(base)
    with pytest.raises(ValueError, match="original: expected the weights before quantization"):
        nf4.load_adapter(again, tmp_path / "pissa")
    nf4.load_adapter(again, tmp_path / "pissa", original=dense)
    assert torch.equal(logits(again), logits(model))


def test_pissa_s_base_is_never_taken_for_another(base, tmp_path) -> None:
    model = with_lora(base, init_lora_weights="pissa", target_modules=["q_proj"])
    nf4.add_lora(model, r=2, adapter_name="second")
    with pytest.raises(ValueError, match="expected the adapter 'default' to save, whose start"):
        nf4.save_adapter(model, tmp_path / "second", "second")
    with pytest.raises(ValueError, match="expected another name than 'default', which started by"):
        nf4.add_lora(model, target_modules=["k_proj"])
    nf4.save_adapter(with_lora(base, target_modules=["k_proj"]), tmp_path / "plain")
    with pytest.raises(ValueError, match="expected an adapter of model.layers.0.self_attn.q_proj"):
        nf4.load_adapter(model, tmp_path / "plain")
    larger = with_lora(base, r=8, init_lora_weights="pissa", target_modules=["q_proj"])
    nf4.save_adapter(larger, tmp_path / "larger")
    with pytest.raises(ValueError, match="pissa of rank 8 .* got one changed by pissa of rank 4"):
        nf4.load_adapter(model, tmp_path / "larger")


# --- merging


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
    assert not adapted(merged)


def test_merge_of_what_adds_nothing_has_no_drift_to_report(base) -> None:
    rows = []
    nf4.merge(with_lora(base, target_modules=["q_proj"]), report=rows.append)
    assert all(row.relative == 0 and row.of_update != row.of_update for row in rows)


@pytest.mark.parametrize("value", [torch.nan, 1e30])
@pytest.mark.parametrize("requantize", [False, True])
def test_merge_of_what_is_not_finite_changes_nothing(requantize, value, base, tmp_path) -> None:
    model = with_lora(base, adapter_name="x")
    adapted(model)[-1].lora_B.data.fill_(value)
    adapted(model)[-1].lora_A.data.fill_(value)
    with pytest.raises(ValueError, match="down_proj: expected base plus adapter that torch"):
        nf4.merge(model, requantize=requantize)
    assert len(adapted(model)) == 14
    if value != value:
        with pytest.raises(ValueError, match="down_proj: expected an adapter of finite val"):
            nf4.save_adapter(model, tmp_path / "nan")


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
    assert adapted(offloaded)[0].lora_A.is_meta
    assert error(logits(offloaded), expected) < 1e-6


def test_pissa_on_a_model_with_a_compiled_part(tiny_llama, tmp_path) -> None:
    dense = tiny_llama().eval()
    quantized = nf4.quantize_model(copy.deepcopy(dense))
    model = with_lora(quantized, init_lora_weights="pissa", original=dense)
    nf4.save_adapter(model, tmp_path / "adapter")
    other = copy.deepcopy(quantized)
    other.model.layers[0] = torch.compile(other.model.layers[0], backend="eager")
    nf4.load_adapter(other, tmp_path / "adapter", original=dense)
    assert error(logits(other), logits(model)) < 1e-6
