"""Adapters where they cannot be, and what else may surround a layer with one."""

import copy

import pytest
import torch
from helpers import error
from kinds import ADD, TOKENS, logits, nf4_layers, randomize, with_kind
from torch import nn
from torch.nn.utils import prune

import nf4
from nf4.adapters.adamix import AdaMix
from nf4.adapters.ia3 import IA3
from nf4.adapters.layer import AdaptedLayer, adapted_layers
from nf4.adapters.term import KINDS, Adapter
from nf4.models.adapt import layer_base, with_adapter


@pytest.fixture
def base(biased_llama) -> nn.Module:
    return biased_llama


def mixture_of(layer: nn.Module) -> AdaMix:
    return layer.adapters["default"]


def spoiled(model: nn.Module, spoil) -> nn.Module:
    nf4.add_adamix(model, r=4)
    with torch.no_grad():
        spoil(mixture_of(adapted_layers(model)[-1]))
    return model


def ranks(mixture: AdaMix) -> None:
    mixture.lora_B = nn.Parameter(torch.zeros(4, mixture.lora_B.shape[1], 5))


def fewer(mixture: AdaMix) -> None:
    mixture.lora_A = nn.Parameter(mixture.lora_A[:3].clone())


BAD = {
    "no_module": (lambda m: nf4.add_ia3(m, ["q"]), ValueError, "names of linear layers, .*'q'"),
    "no_feedforward": (
        lambda m: nf4.add_ia3(m, ["k_proj"], ["nothing"]),
        ValueError,
        "feedforward_modules: expected names of target_modules, .*nothing.* matches none",
    ),
    "feedforward_no_target": (
        lambda m: nf4.add_ia3(m, ["k_proj"], ["up_proj"]),
        ValueError,
        "feedforward_modules: expected names of target_modules, .* which is none of them",
    ),
    "feedforward_number": (
        lambda m: nf4.add_ia3(m, ["k_proj"], [3]),
        TypeError,
        "feedforward_modules: expected names, got 3",
    ),
    "container": (lambda m: nf4.add_ia3(m, ["mlp"]), TypeError, "mlp: expected a LinearNF4, torch"),
    "pattern": (lambda m: nf4.add_adamix(m, target_modules="("), ValueError, "a regular expressio"),
    "no_model": (lambda m: nf4.add_ia3(3, ["k_proj"]), TypeError, "model: expected a torch.nn.Mod"),
    "no_model_known": (lambda m: nf4.add_ia3(3), TypeError, "model: expected a torch.nn.Module"),
    "adamix_model": (lambda m: nf4.add_adamix("m"), TypeError, "expected a torch.nn.Module, got s"),
    "merge_model": (lambda m: nf4.merge_adamix("m"), TypeError, "expected a torch.nn.Module, got"),
    "num_modules": (
        lambda m: nf4.add_adamix(m, num_modules=0),
        ValueError,
        "num_modules: expected an int of at least 1, got 0",
    ),
    "num_modules_float": (
        lambda m: nf4.add_adamix(m, num_modules=2.0),
        TypeError,
        "num_modules: expected an int, got float",
    ),
    "share": (lambda m: nf4.add_adamix(m, share="C"), ValueError, "share: expected None, 'A' or"),
    "r": (lambda m: nf4.add_adamix(m, r=0), ValueError, "r: expected an int of at least 1, got 0"),
    "merge_nothing": (lambda m: nf4.merge_adamix(m), ValueError, "expected mixtures .nf4.add_ada"),
    "name": (lambda m: nf4.add_ia3(m, adapter_name="a.b"), ValueError, "a name without dots"),
    "requantize": (
        lambda m: nf4.merge(m, requantize="scales"),
        TypeError,
        "requantize: expected a bool or 'exact', got 'scales'",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument_is_refused_and_nothing_changed(call, kind, message, base) -> None:
    before = {n: (id(p), p.requires_grad) for n, p in base.named_parameters()}
    modules = list(map(id, base.modules()))
    with pytest.raises(kind, match=message):
        call(base)
    assert {n: (id(p), p.requires_grad) for n, p in base.named_parameters()} == before
    assert list(map(id, base.modules())) == modules


def test_unknown_model_needs_names() -> None:
    with pytest.raises(ValueError, match="target_modules: expected names of layers for a model wh"):
        nf4.add_ia3(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            ranks,
            r"down_proj: expected lora_B of shape \(4, 64, 4\), 4 modules of rank 4, got .*5\)",
        ),
        (fewer, r"down_proj: expected lora_A of shape \(4, 4, 160\), 4 modules of rank 4, got \(3"),
        (lambda m: m.lora_A[0].fill_(torch.nan), "down_proj: expected finite values in lora_A"),
    ],
    ids=["ranks", "fewer", "nan"],
)
def test_mixture_of_mixed_shapes_is_not_merged(spoil, message, base) -> None:
    model = spoiled(base, spoil)
    modules = list(map(id, model.modules()))
    with pytest.raises(ValueError, match=message):
        nf4.merge_adamix(model)
    assert list(map(id, model.modules())) == modules


@pytest.mark.parametrize("file", ["lora", "ia3", "adamix", "fifth"])
@pytest.mark.parametrize("held", ["lora", "ia3", "adamix"])
def test_a_file_of_another_kind_is_refused_unless_beside(file, held, base, tmp_path) -> None:
    other = with_kind(base, file)
    randomize(other)
    nf4.save_adapter(other, tmp_path / file)
    model = with_kind(base, held)
    randomize(model)
    once, modules = logits(model), list(map(id, model.modules()))
    if file == held:
        nf4.load_adapter(model, tmp_path / file)
        assert torch.equal(logits(model), logits(other))
        return
    with pytest.raises(
        ValueError, match="expected peft_type .* like the model's adapter 'default'"
    ):
        nf4.load_adapter(model, tmp_path / file)
    assert torch.equal(logits(model), once) and list(map(id, model.modules())) == modules
    nf4.load_adapter(model, tmp_path / file, "beside")
    assert error(logits(model), logits(other)) < 1e-6
    nf4.set_adapter(model, "default")
    assert error(logits(model), once) < 1e-6
    with pytest.raises(ValueError, match="adapter_name: expected one of .*beside.*, got None"):
        nf4.set_adapter(model, ["default", "beside"])
        nf4.save_adapter(model, tmp_path / "both")


def test_file_of_ia3_that_fits_no_layer_is_refused(base, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = with_kind(base, "ia3")
    nf4.save_adapter(model, tmp_path / "ia3")
    file = tmp_path / "ia3" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    assert tensors[key].shape == (32, 1)
    for value, message in (
        (torch.ones(31, 1), r"k_proj: expected ia3_l of shape \(32, 1\) or \(1, 64\), got \(31, 1"),
        (torch.full((32, 1), torch.inf), "k_proj: expected finite values"),
        (torch.ones(32), r"with the parts ia3_l of 2 dimensions, got '.*ia3_l'.*\(32,\)"),
    ):
        save_file({**tensors, key: value}, file)
        with pytest.raises(ValueError, match=message):
            nf4.load_adapter(base, tmp_path / "ia3")
    assert not adapted_layers(base)


def test_one_layer_takes_an_adapter_of_its_kind_alone(tmp_path) -> None:
    layer, again = (one_ia3_layer() for _ in range(2))
    layer.adapters["default"].ia3_l.data.uniform_()
    nf4.save_adapter(layer, tmp_path / "a")
    nf4.load_adapter(again, tmp_path / "a")
    assert torch.equal(again.adapters["default"].ia3_l, layer.adapters["default"].ia3_l)
    with pytest.raises(ValueError, match="a LinearNF4 alone cannot be replaced in place"):
        nf4.load_adapter(nf4.LinearNF4(64, 48), tmp_path / "a")


def one_ia3_layer() -> AdaptedLayer:
    layer = nf4.LinearNF4(64, 48)
    adapted = with_adapter(layer, "default", IA3(layer_base(layer), of_inputs=False))
    adapted.set_adapter("default")
    return adapted


@pytest.mark.parametrize("kind", ["lora", "adamix"])
def test_torch_s_encoder_layers_call_adapted_layers(kind) -> None:
    """Their fast path, in evaluation, would read the weights instead."""
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 32)
    plain = encoder(x)
    model = ADD[kind](encoder)
    randomize(model)
    found = model(x)
    assert error(found, plain) > 1e-2
    assert error(nf4.merge(model)(x), found) < 1e-5


def test_pissa_needs_its_four_bits(tiny_llama, tmp_path) -> None:
    model = nf4.add_lora(nf4.quantize_model(tiny_llama()), r=4, init_lora_weights="pissa")
    nf4.save_adapter(model, tmp_path / "pissa")
    with pytest.raises(
        ValueError, match="expected a LinearNF4 for an adapter that started by piss"
    ):
        nf4.load_adapter(tiny_llama(), tmp_path / "pissa")
    with pytest.raises(TypeError, match="expected a LinearNF4 for pissa, got Linear"):
        nf4.add_lora(tiny_llama(), r=4, init_lora_weights="pissa")


def test_adapters_on_experts_made_dense_are_merged() -> None:
    from architectures import logits, make

    model, downs = nf4.quantize_model(make("Mixtral")), r".*experts\.down_proj\.expert_\d+"
    nf4.add_lora(model, r=2, target_modules=downs)
    model = nf4.merge(model, requantize="exact")
    nf4.add_lora(model, r=2, target_modules=downs)
    randomize(model)
    found = logits(model, "Mixtral")
    merged = nf4.merge(model)
    assert error(logits(merged, "Mixtral"), found) < 1e-5
    assert merged.state_dict().keys() == make("Mixtral").state_dict().keys()


@pytest.mark.parametrize("add", ["ia3", "adamix"])
def test_no_kind_comes_beside_biases_that_train(add, tiny_llama, tmp_path) -> None:
    other = ADD[add](tiny_llama(attention_bias=True))
    nf4.save_adapter(other, tmp_path / "other")
    model = tiny_llama(attention_bias=True)
    nf4.add_lora(model, r=2, bias="lora_only", target_modules=["q_proj"])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="bias: expected one adapter for a model that trains bias"):
        ADD[add](model, adapter_name="b")
    with pytest.raises(ValueError, match="bias: expected one adapter for a model that trains bias"):
        nf4.load_adapter(model, tmp_path / "other", "b")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained


def test_a_name_is_of_one_kind(base) -> None:
    model = nf4.add_lora(copy.deepcopy(base), r=2, target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match="'default', which is one of kind LORA, for one of kind IA"
    ):
        nf4.add_ia3(model)


def test_merging_frees_layers_one_by_one(tiny_llama, monkeypatch) -> None:
    import weakref

    for requantize in (True, "exact"):
        model = nf4.add_ia3(nf4.quantize_model(tiny_llama()))
        layers = [weakref.ref(m) for m in adapted_layers(model)]
        alive = []
        nf4.merge(model, requantize, lambda _, r=layers, a=alive: a.append(sum(map(bool, held(r)))))
        assert alive == [6, 5, 4, 3, 2, 1]


def held(references: list) -> list[bool]:
    return [reference() is not None for reference in references]


@pytest.mark.parametrize(
    "spoil",
    [
        torch.nn.utils.parametrizations.weight_norm,
        lambda m: prune.random_unstructured(m, "weight", 0.5),
    ],
    ids=["parametrized", "pruned"],
)
def test_layers_whose_weight_is_computed_are_refused(spoil) -> None:
    model = nn.Sequential(nn.Linear(8, 8), spoil(nn.Linear(8, 8)))
    with pytest.raises(
        TypeError, match="1: expected weight to be a parameter, got one that is com"
    ):
        nf4.add_lora(model, r=2)
    assert type(model[0]) is nn.Linear


def test_layers_without_active_adapter_keep_their_form(tiny_llama) -> None:
    model = nf4.add_lora(nf4.quantize_model(tiny_llama()), r=2)
    nf4.set_adapter(model, None)
    for requantize in (True, "exact"):
        merged = nf4.merge(copy.deepcopy(model), requantize)
        assert all(layer.double_quant for layer in nf4_layers(merged))
        assert torch.equal(logits(merged), logits(model))


def test_full_backward_hooks_stay(base) -> None:
    model, seen = copy.deepcopy(base), []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_full_backward_hook(lambda *args: seen.append(args[0]))
    nf4.add_ia3(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert seen == [model.model.layers[0].mlp.down_proj]


def test_float64_layers_merge_in_float64() -> None:
    layer = nf4.add_lora(nn.Sequential(nn.Linear(8, 8).double()), r=2)
    randomize(layer)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert error(nf4.merge(copy.deepcopy(layer))(x), layer(x)) < 1e-15


def test_two_classes_of_one_peft_type_are_refused() -> None:
    with pytest.raises(ValueError, match="peft_type: expected one that no kind has, got 'IA3'"):
        type("Other", (Adapter,), {"peft_type": "IA3"})
    assert KINDS["IA3"] is IA3
