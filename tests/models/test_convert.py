import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import nf4


def test_quantize_model_replaces_all_linears_but_the_skipped(block) -> None:
    dense = copy.deepcopy(block)
    model = nf4.quantize_model(block)
    assert model is block
    assert type(model.up) is type(model.down) is nf4.LinearNF4
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.up.weight.packed, nf4.quantize(dense.up.weight).packed)
    x = torch.randn(4, 96)
    assert (model(x) - dense(x)).norm() < 0.2 * dense(x).norm()


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), []),
        (("1",), ["0.1", "1.0", "1.1"]),
        (("1.0",), ["1.0"]),
        (["0"], ["0.0", "0.1", "1.0"]),
        (r"\d\.1", ["0.1", "1.1"]),
        ("1", ["1.0", "1.1"]),
    ],
    ids=str,
)
def test_quantize_model_skips_by_name_or_last_parts(skip, left) -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)])
    nf4.quantize_model(model, skip_modules=skip)
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Linear)] == left


def test_quantize_model_of_a_linear_returns_the_layer() -> None:
    assert isinstance(nf4.quantize_model(nn.Linear(8, 8)), nf4.LinearNF4)


def test_quantize_model_keeps_a_shared_layer_shared() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    counts = []
    nf4.quantize_model(model, progress=lambda done, total: counts.append((done, total)))
    assert model["a"] is model["b"] and model["a"] is not model["c"]
    assert counts == [(1, 2), (2, 2)]


def test_quantize_model_frees_dense_weights_one_by_one() -> None:
    import weakref

    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    nf4.quantize_model(
        model, progress=lambda *_: alive.append(sum(w() is not None for w in weights))
    )
    assert alive[-1] <= 1 and alive == sorted(alive, reverse=True)


def test_quantize_model_on_meta_then_loads() -> None:
    source = nf4.quantize_model(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)))
    with torch.device("meta"):
        target = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))
    nf4.quantize_model(target)
    target.load_state_dict(source.state_dict(), strict=True, assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(target(x), source(x))


def test_quantize_model_leaves_torch_s_transformer_working() -> None:
    """Its fast path and its attention read weights instead of calling the layers."""
    torch.use_deterministic_algorithms(False)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    dense = layer(x)
    with pytest.warns(UserWarning, match="1 out_proj, whose weight MultiheadAttention reads"):
        nf4.quantize_model(layer)
    with torch.no_grad():
        y = layer(x)
    assert isinstance(layer.linear1, nf4.LinearNF4)
    assert (y - dense).norm() < 0.2 * dense.norm()


def test_quantize_model_names_the_bad_layer_and_changes_nothing(block) -> None:
    block.down.weight.data[3, 4] = torch.nan
    before = {n: id(m) for n, m in block.named_modules()}
    with pytest.raises(ValueError, match="down.weight: expected finite values"):
        nf4.quantize_model(block)
    assert {n: id(m) for n, m in block.named_modules()} == before
    with pytest.raises(TypeError, match="up.weight: expected dtype float32"):
        nf4.quantize_model(block.double())


COMPUTED = {
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "pruned_bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("case", COMPUTED)
def test_layers_with_computed_weights_are_refused_before_anything_changes(case) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    COMPUTED[case](model[1])
    with pytest.raises(TypeError, match="1: expected (weight|bias) to be a parameter, got one"):
        nf4.quantize_model(model)
    assert type(model[0]) is nn.Linear


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input):
        return 2 * super().forward(input)


def test_quantize_model_leaves_layers_that_compute_otherwise() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Doubled(8, 8))
    with pytest.warns(UserWarning, match="left dense are 1 Doubled, whose class has a forward"):
        nf4.quantize_model(model)
    assert type(model[0]) is nf4.LinearNF4 and type(model[1]) is Doubled
    with pytest.raises(TypeError, match="got Doubled"):
        nf4.LinearNF4.from_linear(model[1])


def test_quantize_model_leaves_layers_without_inputs() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 4)
    model = nf4.quantize_model(nn.Sequential(nn.Linear(4, 4), empty))
    assert type(model[1]) is nn.Linear


def test_a_skipped_name_skips_the_layer_under_its_other_name() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    nf4.quantize_model(model, skip_modules=["b"])
    assert model["a"] is model["b"] is shared
    nf4.quantize_model(model)
    nf4.add_lora(model, target_modules=["a"])
    assert model["a"] is model["b"] and isinstance(model["a"], nf4.QLoRALinear)


def test_hooks_go_with_the_layer(block) -> None:
    calls = []
    handle = block.up.register_forward_hook(lambda module, args, out: calls.append(type(module)))
    model = nf4.quantize_model(block)
    model(torch.randn(1, 96))
    nf4.add_lora(model)
    model(torch.randn(1, 96))
    nf4.merge(model)
    model(torch.randn(1, 96))
    assert calls == [nf4.LinearNF4, nf4.QLoRALinear, nn.Linear]
    handle.remove()
    model(torch.randn(1, 96))
    assert len(calls) == 3


def test_a_layer_with_a_patched_forward_is_refused(block) -> None:
    block.down.forward = block.down.forward
    with pytest.raises(ValueError, match="down: expected a layer with the forward of its class"):
        nf4.quantize_model(block)
    assert type(block.up) is nn.Linear
    del block.down.forward
    model = nf4.quantize_model(block)
    model.down.forward = model.down.forward
    with pytest.raises(ValueError, match="down: expected a layer with the forward of its class"):
        nf4.add_lora(model)
    assert model.lm_head.weight.requires_grad and type(model.up) is nf4.LinearNF4


def test_quantize_model_refuses_a_model_with_peft_s_adapters(tiny_llama) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="expected a model without PEFT's adapters, got PeftModel"):
        nf4.quantize_model(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_merge_after_casting_gives_one_dtype(block, dtype) -> None:
    model = nf4.merge(nf4.add_lora(nf4.quantize_model(block)).to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    model(torch.randn(2, 96, dtype=dtype))


def test_merge_after_loading_another_dtype_gives_one_dtype(block) -> None:
    state = nf4.quantize_model(block).bfloat16().state_dict()
    with torch.device("meta"):
        shell = nf4.quantize_model(type(block)())
    shell.load_state_dict(state, assign=True)
    layer = nf4.merge(shell).up
    assert layer.weight.dtype == layer.bias.dtype


def test_add_lora_freezes_all_but_the_adapters(block) -> None:
    model = nf4.quantize_model(block)
    x = torch.randn(4, 96)
    base = model(x)
    packed = model.up.packed
    assert nf4.add_lora(model, r=4, lora_alpha=8, lora_dropout=0.1) is model
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    own = ["adapters.default.lora_A", "adapters.default.lora_B"]
    assert trainable == [f"{layer}.{name}" for layer in ("up", "down") for name in own]
    assert torch.equal(model(x), base)
    assert model.up.packed.data_ptr() == packed.data_ptr(), "the weight is shared, not copied"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ["up", "down"]),
        (["up"], ["up"]),
        (("down", "up"), ["up", "down"]),
        ("(u|x)p", ["up"]),
    ],
    ids=str,
)
def test_add_lora_targets_as_peft_does(block, targets, expected) -> None:
    model = nf4.add_lora(nf4.quantize_model(block), target_modules=targets)
    found = [n for n, m in model.named_modules() if isinstance(m, nf4.QLoRALinear)]
    assert found == expected


def test_add_lora_in_two_steps_keeps_the_first_trainable(block) -> None:
    model = nf4.quantize_model(block)
    nf4.add_lora(model, r=2, target_modules=["up"])
    nf4.add_lora(model, r=8, target_modules=["down"])
    assert (model.up.r, model.down.r) == (2, 8)
    assert model.up.lora_A.requires_grad and model.down.lora_A.requires_grad


def test_merge_gives_plain_linears_with_the_adapters_folded_in(block) -> None:
    model = nf4.add_lora(nf4.quantize_model(block), r=4, target_modules=["up"])
    nn.init.normal_(model.up.lora_B, std=0.02)
    x = torch.randn(4, 96)
    y = model(x)
    assert nf4.merge(model) is model
    assert type(model.up) is type(model.down) is nn.Linear
    torch.testing.assert_close(model(x), y)
    assert [m for m in model.modules() if isinstance(m, nf4.LinearNF4)] == []


def test_quantized_model_trains(block) -> None:
    model = nf4.add_lora(nf4.quantize_model(block), r=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(32, 96), torch.randint(50, (32,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def quantized() -> nn.Module:
    return nf4.quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), skip_modules=["1"])


def nan_linear() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.weight.data[0, 0] = torch.nan
    return layer


BAD = {
    "model": (lambda: nf4.quantize_model("gpt2"), TypeError, "model: expected a torch.nn.Module"),
    "no_linear": (
        lambda: nf4.quantize_model(nn.Sequential(nn.ReLU())),
        ValueError,
        "expected at least one nn.Linear or Conv1D to quantize, found none in Sequential",
    ),
    "skip_pattern": (
        lambda: nf4.quantize_model(nn.Linear(8, 8), skip_modules="lm_head("),
        ValueError,
        "skip_modules: expected a regular expression, got 'lm_head\\('",
    ),
    "skip_none": (
        lambda: nf4.quantize_model(nn.Linear(8, 8), skip_modules=None),
        TypeError,
        "skip_modules: expected a list of names, got NoneType",
    ),
    "skip_number": (
        lambda: nf4.quantize_model(nn.Linear(8, 8), skip_modules=[1]),
        TypeError,
        "skip_modules: expected names, got 1",
    ),
    "skip_all": (
        lambda: nf4.quantize_model(nn.Sequential(nn.Linear(8, 8)), skip_modules=iter(["0"])),
        ValueError,
        r"found none in Sequential \(skip_modules=\('0',\)\)",
    ),
    "lora_targets_none": (
        lambda: nf4.add_lora(quantized(), target_modules=None),
        TypeError,
        "target_modules: expected a list of names, got NoneType",
    ),
    "lora_targets_regex": (
        lambda: nf4.add_lora(quantized(), target_modules="("),
        ValueError,
        "target_modules: expected a regular expression, got '\\('",
    ),
    "model_error_nan": (
        lambda: nf4.model_error(nn.Sequential(nan_linear())),
        ValueError,
        "0.weight: expected finite values",
    ),
    "model_error_meta": (
        lambda: nf4.model_error(nn.Sequential(nn.Linear(8, 8, device="meta"))),
        ValueError,
        "0.weight: expected values to measure, got a meta tensor",
    ),
    "block_size": (lambda: nf4.quantize_model(nn.Linear(8, 8), block_size=3), ValueError, "got 3"),
    "lora_model": (lambda: nf4.add_lora(None), TypeError, "expected a torch.nn.Module, got None"),
    "lora_r": (lambda: nf4.add_lora(quantized(), r=0), ValueError, "r: expected"),
    "lora_dropout": (lambda: nf4.add_lora(quantized(), lora_dropout=1.5), ValueError, "got 1.5"),
    "lora_no_match": (
        lambda: nf4.add_lora(quantized(), target_modules=["q_proj"]),
        ValueError,
        r"target_modules: .*\['q_proj'\] matches none; the model has 0",
    ),
    "lora_no_linear": (
        lambda: nf4.add_lora(nn.Sequential(nn.ReLU())),
        ValueError,
        "expected names of linear layers, .* the model has no linear layer",
    ),
    "lora_other_target": (
        lambda: nf4.add_lora(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), target_modules=["1"]),
        TypeError,
        "1: expected a LinearNF4, torch.nn.Linear or Conv1D, got ReLU",
    ),
    "lora_twice": (
        lambda: nf4.add_lora(nf4.add_lora(quantized(), r=3)),
        ValueError,
        "0: expected a layer without adapter 'default', got one with r=3",
    ),
    "merge_dense": (lambda: nf4.merge(nn.Linear(8, 8)), ValueError, "expected LinearNF4 layers"),
    "merge_model": (lambda: nf4.merge(3), TypeError, "expected a torch.nn.Module, got int"),
    "model_error_none": (lambda: nf4.model_error(nn.ReLU()), ValueError, "found none in ReLU"),
    "model_error_model": (lambda: nf4.model_error(3), TypeError, "got int"),
}


@pytest.mark.parametrize("case", BAD)
def test_conversion_rejects(case) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
