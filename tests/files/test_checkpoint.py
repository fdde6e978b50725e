"""Adapters on disk: PEFT's files, both ways, and what a bad file does."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nf4


def add_random_lora(model: nn.Module, **options) -> nn.Module:
    nf4.add_lora(model, **options)
    for module in model.modules():
        if isinstance(module, nf4.QLoRALinear):
            nn.init.normal_(module.lora_B, std=0.05)
    return model


@pytest.fixture
def saved(block, tmp_path):
    """Save an adapter of r=4, alpha=8 for Block, and return its folder."""
    add_random_lora(nf4.quantize_model(block), r=4, lora_alpha=8)
    nf4.save_adapter(block, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def fresh(block, saved):
    """Make a quantized Block with other random weights but no adapter."""
    return nf4.quantize_model(type(block)())


def snapshot(model: nn.Module) -> dict[str, bytes]:
    return {n: p.detach().numpy().tobytes() for n, p in model.state_dict().items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_round_trips_to_equal_logits(tiny_llama, tmp_path, rslora) -> None:
    model = add_random_lora(
        nf4.quantize_model(tiny_llama()), r=3, lora_alpha=5, lora_dropout=0.1, use_rslora=rslora
    ).eval()
    tokens = torch.arange(20)[None]
    nf4.save_adapter(model, tmp_path / "a")
    other = nf4.quantize_model(tiny_llama()).eval()
    assert not torch.equal(other(tokens).logits, model(tokens).logits)
    nf4.load_adapter(other, str(tmp_path / "a"))
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    layer = other.model.layers[0].mlp.up_proj
    assert (layer.r, layer.lora_alpha, layer.lora_dropout) == (3, 5, 0.1)
    trainable = {n.rpartition(".")[2] for n, p in other.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}


def test_adapter_is_loaded_by_peft(tiny_llama, tmp_path) -> None:
    """What the adapter adds to the dense model is the same, with two ranks and alphas."""
    from peft import PeftModel

    model = nf4.quantize_model(tiny_llama())
    add_random_lora(model, r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"])
    add_random_lora(model, r=7, lora_alpha=9, target_modules=["down_proj"])
    nf4.save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    found = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nf4.QLoRALinear):
            delta = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
            torch.testing.assert_close(delta, layer.scaling * layer.lora_B @ layer.lora_A)
            found += 1
    assert found == 6


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_of_peft_is_loaded(tiny_llama, tmp_path, rslora) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        rank_pattern={"q_proj": 6},
        alpha_pattern={"layers.1.self_attn.q_proj": 11},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    theirs = get_peft_model(tiny_llama(), config)
    theirs.save_pretrained(tmp_path / "a")
    model = nf4.quantize_model(tiny_llama())
    nf4.load_adapter(model, tmp_path / "a")
    for name, layer in model.named_modules():
        if isinstance(layer, nf4.LinearNF4):
            delta = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
            torch.testing.assert_close(delta, layer.scaling * layer.lora_B @ layer.lora_A)
    assert model.model.layers[1].self_attn.q_proj.lora_alpha == 11


def test_adapter_of_a_single_layer_round_trips(tmp_path) -> None:
    layer = nf4.QLoRALinear(96, 80, r=2)
    nn.init.normal_(layer.lora_B)
    nf4.save_adapter(layer, tmp_path / "a")
    other = nf4.QLoRALinear(96, 80, r=2)
    nf4.load_adapter(other, tmp_path / "a")
    assert torch.equal(other.lora_A, layer.lora_A) and torch.equal(other.lora_B, layer.lora_B)


class Shared(nn.Module):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


def test_adapter_of_a_layer_with_two_names_round_trips(tmp_path) -> None:
    torch.manual_seed(1)
    model = add_random_lora(nf4.quantize_model(Shared()), r=2)
    nf4.save_adapter(model, tmp_path / "a")
    torch.manual_seed(1)
    other = nf4.quantize_model(Shared())
    nf4.load_adapter(other, tmp_path / "a")
    assert other.a is other.b
    x = torch.randn(3, 64)
    assert torch.equal(other(x), model(x))
    nf4.load_adapter(model, tmp_path / "a")
    assert model.a is model.b and torch.equal(other(x), model(x))
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    weights |= {k.replace(".a.", ".b."): v + 1 for k, v in weights.items()}
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="b: expected the tensors of the layer's other name"):
        nf4.load_adapter(other, tmp_path / "a")


def test_adapter_names_leave_out_what_compile_wraps(block, tmp_path) -> None:
    model = add_random_lora(nf4.quantize_model(block), r=2)
    nf4.save_adapter(torch.compile(model), tmp_path / "a")
    model.up = torch.compile(model.up)
    nf4.save_adapter(model, tmp_path / "b")
    keys = [set(load_file(tmp_path / f / "adapter_model.safetensors")) for f in "ab"]
    assert keys[0] == keys[1] and UP_A in keys[0]
    nf4.load_adapter(torch.compile(model), tmp_path / "a")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["0.up", "1.up"], ["up"]),
        (["0.up"], ["0.up"]),
        (["0.up", "1.up", "0.down", "1.down"], ["down", "up"]),
    ],
    ids=str,
)
def test_target_modules_name_the_adapted_layers_and_no_others(block, tmp_path, paths, expected):
    model = nf4.quantize_model(nn.Sequential(block, type(block)()))
    nf4.add_lora(model, target_modules=paths)
    nf4.save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == expected


def test_target_modules_become_a_pattern_where_a_list_says_too_much(tmp_path) -> None:
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "x": nn.ModuleDict({"up": nn.Linear(8, 8)})})
    nf4.add_lora(nf4.quantize_model(model), target_modules="up")
    nf4.save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == "up"


def test_adapter_and_meta_do_not_mix(block, saved, tmp_path) -> None:
    with torch.device("meta"):
        empty = nf4.quantize_model(type(block)())
    with pytest.raises(ValueError, match="expected a layer with values, got one on meta"):
        nf4.load_adapter(empty, saved)
    nf4.add_lora(empty)
    with pytest.raises(ValueError, match="expected an adapter with values, got one on meta"):
        nf4.save_adapter(empty, tmp_path / "meta")


def test_adapter_of_a_bare_layer_must_fit_in_place(tmp_path) -> None:
    nf4.save_adapter(nf4.QLoRALinear(96, 80, r=2), tmp_path / "a")
    for layer in (nf4.LinearNF4(96, 80), nf4.QLoRALinear(96, 80, r=3)):
        with pytest.raises(ValueError, match="cannot be replaced in place"):
            nf4.load_adapter(layer, tmp_path / "a")
        assert layer.bias.requires_grad


def test_load_replaces_the_adapters_that_are_there(fresh, saved) -> None:
    add_random_lora(fresh, r=4, target_modules=["up"])
    add_random_lora(fresh, r=2, target_modules=["down"])
    same_object = fresh.up
    weights = load_file(saved / "adapter_model.safetensors")
    nf4.load_adapter(fresh, saved)
    assert fresh.up is same_object and fresh.down.r == 4
    assert torch.equal(fresh.up.lora_A, weights["base_model.model.up.lora_A.weight"])


def test_load_removes_adapters_the_file_does_not_have(block, tmp_path) -> None:
    model = add_random_lora(nf4.quantize_model(block), r=4, target_modules=["up"])
    nf4.save_adapter(model, tmp_path / "a")
    nf4.add_lora(model, r=2, target_modules=["down"])
    nf4.load_adapter(model, tmp_path / "a")
    assert type(model.down) is nf4.LinearNF4 and type(model.up) is nf4.QLoRALinear


def test_save_leaves_nothing_when_it_fails(block, tmp_path, monkeypatch) -> None:
    model = add_random_lora(nf4.quantize_model(block), r=4)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("nf4.files.adapters.save_tensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        nf4.save_adapter(model, tmp_path / "new" / "adapter")
    assert list((tmp_path / "new").iterdir()) == []


def edit_config(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def truncate(folder) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


UP_A = "base_model.model.up.lora_A.weight"
UP_B = "base_model.model.up.lora_B.weight"
DOWN_M = "base_model.model.down.lora_magnitude_vector"
UP_BIAS = "base_model.model.up.base_layer.bias"
UP_M = "base_model.model.up.lora_magnitude_vector"
BAD_FILES = {
    "no_folder": (lambda f: f.rename(f.with_name("gone")), FileNotFoundError, "does not exist"),
    "no_weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        "expected a folder with adapter_model.safetensors",
    ),
    "truncated": (truncate, ValueError, "adapter_model.safetensors: expected a safetensors file"),
    "not_safetensors": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"PK\x03\x04 pickle"),
        ValueError,
        "expected a safetensors file",
    ),
    "config_cut": (
        lambda f: (f / "adapter_config.json").write_text('{"r": 4,'),
        ValueError,
        "adapter_config.json: expected JSON",
    ),
    "config_list": (
        lambda f: (f / "adapter_config.json").write_text("[]"),
        ValueError,
        "expected peft_type 'IA3' or 'LORA' or 'NF4_ADAMIX'.*, got 'list'",
    ),
    "ia3": (
        lambda f: edit_config(f, peft_type="IA3"),
        ValueError,
        "expected a plain IA3 adapter, got r=4",
    ),
    "kind": (lambda f: edit_config(f, peft_type="OFT"), ValueError, "peft_type .*, got 'OFT'"),
    "kind_list": (lambda f: edit_config(f, peft_type=[]), ValueError, r"peft_type .*, got \[\]"),
    "dora": (
        lambda f: edit_config(f, use_dora=True),
        ValueError,
        "expected what use_dora=True needs, got no lora_magnitude_vector",
    ),
    "magnitude": (
        lambda f: edit_tensors(f, lambda t: t.update({UP_M: torch.ones(160)})),
        ValueError,
        "up: expected what use_dora=False needs, got a lora_magnitude_vector",
    ),
    "magnitude_shape": (
        lambda f: (
            edit_config(f, use_dora=True),
            edit_tensors(f, lambda t: t.update({UP_M: torch.ones(159), DOWN_M: torch.ones(96)})),
        ),
        ValueError,
        r"up: expected lora_magnitude_vector of shape \(160,\), got \(159,\)",
    ),
    "bias": (lambda f: edit_config(f, bias="some"), ValueError, "bias='some'"),
    "bias_unasked": (
        lambda f: edit_tensors(f, lambda t: t.update({UP_BIAS: torch.ones(160)})),
        ValueError,
        "expected no bias with bias='none', got 'up.base_layer.bias'",
    ),
    "bias_shape": (
        lambda f: (
            edit_config(f, bias="lora_only"),
            edit_tensors(f, lambda t: t.update({UP_BIAS: torch.ones(159)})),
        ),
        ValueError,
        r"up.base_layer.bias: expected the bias of a layer .* shape \(160,\) .*, got \(159,\)",
    ),
    "r": (lambda f: edit_config(f, r=0), ValueError, "r: expected an int of at least 1, got 0"),
    "r_none": (lambda f: edit_config(f, r=None), ValueError, "r: expected an int, got NoneType"),
    "dropout": (lambda f: edit_config(f, lora_dropout=3), ValueError, "lora_dropout: expected"),
    "other_model": (
        lambda f: edit_tensors(f, lambda t: t.update({UP_A.replace("up", "q"): t.pop(UP_A)})),
        ValueError,
        "got one of 'q', which it does not have",
    ),
    "half": (
        lambda f: edit_tensors(f, lambda t: t.pop(UP_A)),
        ValueError,
        "up: expected lora_A and lora_B, got no lora_A.weight",
    ),
    "unknown_layer": (
        lambda f: edit_tensors(
            f, lambda t: [t.update({k.replace(".up.", ".q."): t.pop(k)}) for k in list(t)]
        ),
        ValueError,
        "got one of 'q', which it does not have",
    ),
    "dense_layer": (
        lambda f: edit_tensors(
            f, lambda t: [t.update({k.replace(".up.", ".lm_head."): t.pop(k)}) for k in list(t)]
        ),
        ValueError,
        r"lm_head: expected lora_A and lora_B of shapes \(r, 96\) and \(50, r\)",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({UP_A: torch.zeros(4, 95)})),
        ValueError,
        r"up: expected lora_A and lora_B of shapes \(r, 96\) and \(160, r\) .*, got \(4, 95\)",
    ),
    "dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({UP_A: torch.zeros(4, 96).int()})),
        ValueError,
        "up.lora_A.weight', torch.int32",
    ),
    "extra_tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"wte.weight": torch.zeros(4, 96)})),
        ValueError,
        "expected floating tensors called .*, got 'wte.weight'",
    ),
    "rank": (
        lambda f: edit_config(f, r=8),
        ValueError,
        "expected tensors of rank 8, got 4",
    ),
    "rank_zero": (
        lambda f: edit_tensors(
            f, lambda t: t.update({UP_A: torch.zeros(0, 96), UP_B: torch.zeros(160, 0)})
        ),
        ValueError,
        "with r ≥ 1, got",
    ),
    "nan": (
        lambda f: edit_tensors(f, lambda t: t.update({UP_A: torch.full((4, 96), torch.nan)})),
        ValueError,
        "up: expected finite values",
    ),
    "alpha_pattern_text": (
        lambda f: edit_config(f, alpha_pattern={"up": "x"}),
        ValueError,
        "up: lora_alpha: expected a number, got str",
    ),
    "alpha_pattern_zero": (
        lambda f: edit_config(f, alpha_pattern={"down": 0}),
        ValueError,
        "down: lora_alpha: expected a finite number above 0, got 0",
    ),
    "alpha_pattern_regex": (
        lambda f: edit_config(f, alpha_pattern={"(": 3}),
        ValueError,
        "alpha_pattern: expected regular expressions and values",
    ),
    "alpha_pattern_list": (
        lambda f: edit_config(f, alpha_pattern=["up"]),
        ValueError,
        "alpha_pattern: expected regular expressions and values",
    ),
    "olora": (
        lambda f: edit_config(f, init_lora_weights="olora"),
        ValueError,
        "init_lora_weights='olora'",
    ),
    "rslora_text": (lambda f: edit_config(f, use_rslora="false"), ValueError, "use_rslora='false'"),
    "unknown_option": (lambda f: edit_config(f, use_new=True), ValueError, "use_new=True"),
    "empty": (lambda f: edit_tensors(f, lambda t: t.clear()), ValueError, "got none"),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_adapter_is_refused_and_the_model_untouched(fresh, saved, case, adapted) -> None:
    spoil, kind, message = BAD_FILES[case]
    spoil(saved)
    if adapted:
        add_random_lora(fresh, r=4)
    before, modules = snapshot(fresh), {n: id(m) for n, m in fresh.named_modules()}
    with pytest.raises(kind, match=message):
        nf4.load_adapter(fresh, saved)
    assert snapshot(fresh) == before
    assert {n: id(m) for n, m in fresh.named_modules()} == modules
    assert any(p.requires_grad for p in fresh.parameters()), "still trainable, as before"


def test_save_refuses_an_existing_folder(block, saved) -> None:
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    with pytest.raises(FileExistsError, match="expected a folder that does not exist yet"):
        nf4.save_adapter(block, saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_save_refuses_what_peft_cannot_describe(block, tmp_path) -> None:
    model = nf4.quantize_model(block)
    with pytest.raises(ValueError, match="expected layers with adapters"):
        nf4.save_adapter(model, tmp_path / "a")
    nf4.add_lora(model, r=4, target_modules=["up"], lora_dropout=0.1)
    nf4.add_lora(model, r=4, target_modules=["down"])
    with pytest.raises(ValueError, match="lora_dropout: expected one value for all adapters"):
        nf4.save_adapter(model, tmp_path / "a")
    with pytest.raises(TypeError, match="got dict"):
        nf4.save_adapter({}, tmp_path / "a")
    with pytest.raises(TypeError, match="got dict"):
        nf4.load_adapter({}, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
