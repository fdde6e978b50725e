"""DeepSpeed's ZeRO-3 is refused in words; DeepSpeed itself is not needed for that."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations import deepspeed

import nf4
from nf4.integrations.transformers import NF4Config

MESSAGE = r"got DeepSpeed ZeRO-3, .* use torch's fully_shard \(FSDP2\), or ZeRO-2"


@pytest.fixture
def zero() -> Iterator:
    """Set a stage of ZeRO, as TrainingArguments(deepspeed=…) and accelerate's plugin do."""
    kept = []  # transformers holds a weak reference

    def choose(stage: int) -> None:
        kept.append(HfDeepSpeedConfig({"zero_optimization": {"stage": stage}}))
        deepspeed.set_hf_deepspeed_config(kept[-1])

    yield choose
    deepspeed.unset_hf_deepspeed_config()


@pytest.fixture
def folder(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def unreadable(folder) -> None:
    """Let loading a weight fail, so that a refusal must have come before."""
    (folder / "model.safetensors").write_bytes(b"")


def test_zero3_is_refused_before_a_dense_model_is_loaded(folder, zero) -> None:
    unreadable(folder)
    zero(3)
    with pytest.raises(ValueError, match=f"^quantization_config: .*{MESSAGE}"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config())


def test_zero3_is_refused_before_a_quantized_model_is_loaded(tiny_llama, zero, tmp_path) -> None:
    nf4.quantize_model(tiny_llama()).save_pretrained(tmp_path / "4bit")
    unreadable(tmp_path / "4bit")
    zero(3)
    with pytest.raises(ValueError, match=f"^quantization_config: .*{MESSAGE}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")


def test_zero3_is_refused_before_a_model_is_quantized(tiny_llama, zero) -> None:
    model = tiny_llama()
    zero(3)
    with pytest.raises(ValueError, match=f"^model: .*{MESSAGE}"):
        nf4.quantize_model(model)
    assert not any(isinstance(module, nf4.LinearNF4) for module in model.modules())


def test_zero3_is_refused_when_a_trainer_takes_a_model(tiny_llama, zero, tmp_path) -> None:
    model = nf4.add_lora(nf4.quantize_model(tiny_llama()))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    Trainer(model, arguments)
    zero(3)
    with pytest.raises(ValueError, match=f"^model: .*{MESSAGE}"):
        Trainer(model, arguments)


def test_zero2_is_taken(folder, tiny_llama, zero, tmp_path) -> None:
    zero(2)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config())
    assert isinstance(model.model.layers[0].mlp.up_proj, nf4.LinearNF4)
    nf4.quantize_model(tiny_llama())
    Trainer(nf4.add_lora(model), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))


def test_a_partitioned_parameter_is_refused_by_its_name() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    weight = model[1].weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)  # as deepspeed.zero.Init leaves it
    with pytest.raises(ValueError, match=r"^1\.weight: expected a whole parameter, got one that"):
        nf4.quantize_model(model)
    assert type(model[0]) is nn.Linear
