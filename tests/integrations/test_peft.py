"""PEFT on quantized layers, against PEFT on the same weights made dense."""

import copy
import warnings

import pytest
import torch
from helpers import error
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

import nf4
from nf4.functional import dequantize_rows
from nf4.integrations.peft import NF4LoraLinear
from nf4.ops import products

TOKENS = torch.arange(24).view(2, 12) % 320


@pytest.fixture
def bases(tiny_llama) -> tuple[nn.Module, nn.Module]:
    """A quantized model, and the same weights dense."""
    quantized = nf4.quantize_model(tiny_llama()).eval()
    return quantized, nf4.merge(copy.deepcopy(quantized)).eval()


def adapted(base: nn.Module, seed: int = 3, **options) -> PeftModel:
    """Put adapters on a copy of a model; a seed gives both models the same ones."""
    torch.manual_seed(seed)
    sizes = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(copy.deepcopy(base), LoraConfig(**{**sizes, **options})).eval()


def layers(model: nn.Module) -> dict[str, NF4LoraLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4LoraLinear)}


def logits(model: nn.Module, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, **options).logits


METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "some_layers": {"target_modules": ["q_proj", "down_proj"]},
    "patterns": {"target_modules": r".*\.mlp\.\w+_proj", "rank_pattern": {"up_proj": 7}},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "saved_head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_scaling_that_peft_made_a_tensor_changes_nothing(use_dora, dropout, bases) -> None:
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = adapted(bases[0], use_dora=use_dora, lora_dropout=dropout)
    expected = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert all(isinstance(m.scaling["default"], torch.Tensor) for m in layers(model).values())
    assert error(logits(model), expected) < 1e-6
    model.train()(TOKENS).logits.sum().backward()
    assert error(logits(model.eval().merge_and_unload()), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
def test_peft_gives_the_same_as_on_dense_weights(options, bases, tmp_path) -> None:
    ours, theirs = (adapted(base, **options) for base in bases)
    assert layers(ours) and not layers(theirs)
    with torch.no_grad():  # beside the point where W and its length cancel
        for name, p in ours.named_parameters():
            if "magnitude" in name:
                p.mul_(1.1)
    theirs.load_state_dict(
        {k: v for k, v in ours.state_dict().items() if "lora_" in k}, strict=False
    )
    assert error(logits(ours), logits(theirs)) < 1e-5
    for model in (ours, theirs):
        model.train()  # no dropout in these
        model(TOKENS, labels=TOKENS).loss.backward()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert error(grads[name], grad) < 1e-4, name
    if options.get("lora_bias"):
        return  # PEFT 0.21 refuses such a bias when it loads one, on dense layers too
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.eval().save_pretrained(tmp_path / name)
    crossed = PeftModel.from_pretrained(copy.deepcopy(bases[0]), tmp_path / "theirs").eval()
    assert error(logits(crossed), logits(theirs)) < 1e-5
    crossed = PeftModel.from_pretrained(copy.deepcopy(bases[1]), tmp_path / "ours").eval()
    assert error(logits(crossed), logits(ours)) < 1e-5


def test_one_adapter_is_one_fused_call(bases, monkeypatch) -> None:
    calls, fused = [], products._multiplied_lora
    monkeypatch.setattr(
        products, "_multiplied_lora", lambda *args: calls.append(args) or fused(*args)
    )
    model = adapted(bases[0], lora_dropout=0.25)
    logits(model)
    assert len(calls) == len(layers(model)) == 14
    assert {len(args) for args in calls} == {5}  # no dropout
    model.train()
    logits(model)
    assert calls[-1][5].p == 0.25


def test_adapters_are_switched_stacked_disabled_and_mixed(bases) -> None:
    models = [adapted(base, seed=1) for base in bases]
    for model in models:
        torch.manual_seed(2)
        config = LoraConfig(
            r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False, use_rslora=True
        )
        model.add_adapter("second", config)
    ours, theirs = models
    assert error(logits(ours), logits(theirs)) < 1e-5
    for model in models:
        model.set_adapter("second")
    second = logits(theirs)
    assert error(logits(ours), second) < 1e-5
    for model in models:
        model.base_model.set_adapter(["default", "second"])
    assert error(logits(ours), logits(theirs)) < 1e-5
    with ours.disable_adapter():
        assert error(logits(ours), logits(bases[1])) < 1e-5
    names = ["__base__", "second"]
    for model in models:
        model.set_adapter("default")
    mixed = logits(ours, adapter_names=names)
    assert error(mixed, logits(theirs, adapter_names=names)) < 1e-5
    assert error(mixed[1], second[1]) < 1e-5
    ours.delete_adapter("second")
    assert all("second" not in layer.lora_A for layer in layers(ours).values())


@pytest.mark.parametrize("use_dora", [False, True])
def test_merge_is_dense_and_unmerge_exact(use_dora, bases) -> None:
    model = adapted(bases[0], use_dora=use_dora)
    before = logits(model)
    packed = {n: m.base.packed.clone() for n, m in layers(model).items()}
    model.merge_adapter()
    assert error(logits(model), before) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(m.base.packed, packed[n]) for n, m in layers(model).items())
    merged = model.merge_and_unload(safe_merge=True)
    assert error(logits(merged), before) < 1e-4
    assert not [m for m in merged.modules() if isinstance(m, (nf4.LinearNF4, NF4LoraLinear))]


def test_unload_gives_the_quantized_layers_back(bases) -> None:
    model = adapted(bases[0]).unload()
    assert torch.equal(logits(model), logits(bases[0]))
    assert isinstance(model.model.layers[0].mlp.up_proj, nf4.LinearNF4)


def test_safe_merge_refuses_what_is_not_finite(bases) -> None:
    model = adapted(bases[0], target_modules=["q_proj"])
    layer = next(iter(layers(model).values()))
    layer.lora_B["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="adapter default: expected finite weights"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_prepare_for_training_and_a_few_steps_lower_the_loss(bases) -> None:
    model = copy.deepcopy(bases[0]).bfloat16()
    packed = model.model.layers[0].mlp.up_proj.packed.clone()
    model = prepare_model_for_kbit_training(model)
    assert model.model.norm.weight.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = adapted(model, init_lora_weights=True, lora_dropout=0.05).train()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(model.base_model.model.model.layers[0].mlp.up_proj.base.packed, packed)


BAD_OPTIONS = {
    "olora": ({"init_lora_weights": "olora"}, "expected 'pissa' or one that leaves the base weig"),
    "loftq": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        "for LoftQ see replace_lora_weights_loftq",
    ),
    "alora": (
        {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
        "alora_invocation_tokens: expected LoRA or DoRA",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_peft_refuses_what_is_not_there(options, message, bases) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(bases[0], **options)


def test_peft_refuses_a_layer_with_an_adapter_of_ours(bases) -> None:
    model = nf4.add_lora(copy.deepcopy(bases[0]), r=2)
    with pytest.raises(ValueError, match="expected a LinearNF4 without adapter, got a QLoRALinear"):
        adapted(model, target_modules=["q_proj"])


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("n", "k", "block_size"), [(70, 33, 64), (9, 128, 32), (5, 48, 4096)])
def test_dequantize_rows_yields_the_whole_matrix(n, k, block_size, double_quant) -> None:
    q = nf4.quantize(torch.randn(n, k), block_size, double_quant)
    parts = list(dequantize_rows(q, 4, torch.float32))
    assert torch.equal(torch.cat([w for _, w in parts]), nf4.dequantize(q))
    assert [rows.start for rows, _ in parts][1:] == [rows.stop for rows, _ in parts][:-1]
    assert len(parts) > 1 or block_size == 4096
