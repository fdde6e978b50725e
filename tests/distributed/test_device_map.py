"""Models that accelerate spreads over devices; on a CPU its hooks, and layers on a disk."""

import pipeline_worker
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook
from helpers import error
from pipeline_worker import TOKENS, trained
from torch import nn
from transformers import AutoModelForCausalLM

import nf4

SPREAD = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("kind", ["lora", "peft", "fused"])
def test_a_spread_model_computes_and_trains_what_is_in_memory(kind, tmp_path) -> None:
    whole = pipeline_worker.whole_model(kind)
    spread = pipeline_worker.whole_model(kind)
    spread = dispatch_model(spread, SPREAD, main_device="cpu", offload_dir=tmp_path)
    assert {p.device.type for p in spread.model.layers[0].parameters()} == {"meta"}
    losses = [model(input_ids=TOKENS, labels=TOKENS).loss for model in (whole, spread)]
    assert abs(losses[1] - losses[0]) < 1e-5 * losses[0]
    for loss in losses:
        loss.backward()
    found = {n: p.grad for n, p in trained(spread).items() if p.grad is not None}
    expected = {n: p.grad for n, p in trained(whole).items()}
    # accelerate makes a new parameter of what it brings in at each call: nothing to train there
    in_memory = {n for n in expected if n.startswith(("model.layers.1.", "model.layers.3."))}
    assert found.keys() == in_memory
    for name, grad in found.items():
        assert error(grad, expected[name]) < 1e-4, name
    with torch.no_grad():  # one row, which layers multiply another way
        rows = [model(input_ids=TOKENS[:1, :1]).logits for model in (whole, spread)]
    assert error(rows[1], rows[0]) < 1e-5


PLACES = {name: "cpu" for name in SPREAD}


def placed(model: nn.Module) -> nn.Module:
    """Return a model with the hooks that it gets where its layers are on several GPUs."""
    return dispatch_model(model, PLACES, main_device="cpu", force_hooks=True)


def dense() -> nn.Module:
    """Return a model of four layers."""
    return nf4.merge(pipeline_worker.whole_model("lora"))


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    nf4.add_lora(model, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


ORDERS = {
    "quantized-adapted-placed": lambda model: placed(lora(nf4.quantize_model(model))),
    "quantized-placed-adapted": lambda model: lora(placed(nf4.quantize_model(model))),
    "placed-quantized-adapted": lambda model: lora(nf4.quantize_model(placed(model))),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_layers_that_have_a_device_are_quantized_adapted_trained_and_merged(order) -> None:
    whole, spread = lora(nf4.quantize_model(dense())), order(dense())
    layers = [module for module in spread.modules() if isinstance(module, nf4.QLoRALinear)]
    assert len(layers) == 28 and all("forward" in vars(layer) for layer in layers)
    seen = []
    layers[0]._hf_hook = Seen(seen)
    for model in (whole, spread):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert seen == [layers[0]]
    for name, parameter in trained(whole).items():
        assert error(spread.get_parameter(name).grad, parameter.grad) < 1e-4, name
    with torch.no_grad():
        merged = [nf4.merge(model)(input_ids=TOKENS).logits for model in (whole, spread)]
    assert error(merged[1], merged[0]) < 1e-5
    assert seen == [layers[0], spread.model.layers[0].self_attn.q_proj]
    assert type(seen[1]) is nn.Linear


class Seen(ModelHook):
    """Keeps what it was called for."""

    def __init__(self, seen: list[nn.Module]) -> None:
        self.seen = seen

    def pre_forward(self, module: nn.Module, *args, **kwargs) -> tuple:
        """Keep the module."""
        self.seen.append(module)
        return args, kwargs


def test_a_forward_that_does_more_than_to_place_is_not_lost() -> None:
    model = placed(nf4.quantize_model(dense()))
    layer = model.model.layers[0].mlp.up_proj
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj: expected a layer with"):
        nf4.add_lora(model)
    layer.forward = forward
    layer._old_forward = lambda x: x
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj: expected a layer with"):
        nf4.merge(model)


def test_a_model_too_large_for_memory_is_refused_before_it_is_loaded(tmp_path) -> None:
    folder = tmp_path / "4bit"
    model = pipeline_worker.whole_model("lora")
    nf4.merge(model, requantize=True).save_pretrained(folder)
    small = {"cpu": 60_000}  # bytes, of 100,000
    with pytest.raises(ValueError, match="device_map: expected devices for the 4-bit weights, got"):
        AutoModelForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory=small, offload_folder=tmp_path / "offload"
        )
