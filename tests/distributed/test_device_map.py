"""Models that accelerate spreads over devices: layers in memory and on a disk, on a CPU."""

import pipeline_worker
import pytest
import torch
from accelerate import dispatch_model
from helpers import error
from pipeline_worker import TOKENS, trained
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


def test_a_model_too_large_for_memory_is_refused_before_it_is_loaded(tmp_path) -> None:
    folder = tmp_path / "4bit"
    model = pipeline_worker.whole_model("lora")
    nf4.merge(model, requantize=True).save_pretrained(folder)
    small = {"cpu": 60_000}  # bytes, of 100,000
    with pytest.raises(ValueError, match="device_map: expected devices for the 4-bit weights, got"):
        AutoModelForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory=small, offload_folder=tmp_path / "offload"
        )
