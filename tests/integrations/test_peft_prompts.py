"""PEFT's prompts on 4-bit embeddings, adapters made on meta, and how many parameters there are."""

import pytest
import torch
from architectures import make
from peft import (
    CPTConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

import nf4

TOKENS = torch.arange(12)[None]
CAUSAL = {"task_type": "CAUSAL_LM"}
CPT = {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}
PROMPTS = {
    "prompt": PromptTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "prefix": PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "P-tuning": PromptEncoderConfig(**CAUSAL, num_virtual_tokens=4, encoder_hidden_size=8),
    "CPT": CPTConfig(**CAUSAL, **CPT),
}


def base(name="Llama"):
    return nf4.quantize_model(make(name), skip_modules=(), quantize_embeddings=True)


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_find_embeddings_in_4_bits(kind, tmp_path) -> None:
    model = base()
    peft = get_peft_model(model, PROMPTS[kind])
    assert "named_parameters" not in vars(model)
    peft(TOKENS, labels=TOKENS).loss.backward()
    trained = {n for n, p in peft.named_parameters() if p.grad is not None}
    assert trained and all(n.startswith("prompt_encoder") for n in trained)
    peft.eval().save_pretrained(tmp_path / kind)
    again = PeftModel.from_pretrained(base(), tmp_path / kind).eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, peft(TOKENS).logits)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # of the dense GPT-2
@pytest.mark.parametrize("name", ["Llama", "Gemma", "GPT-2", "Mixtral", "T5", "BERT"])
def test_parameters_are_counted_as_of_the_dense_model(name) -> None:
    dense, model = make(name), base(name)
    assert model.num_parameters() == dense.num_parameters()
    expected = dense.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(exclude_embeddings=True) == expected
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 0
    target = {"GPT-2": "c_attn", "T5": "q", "BERT": "query"}.get(name, "q_proj")
    config = LoraConfig(target_modules=[target], r=2)
    assert get_peft_model(model, config).get_nb_trainable_parameters() == (
        get_peft_model(dense, config).get_nb_trainable_parameters()
    )


def test_dora_made_on_meta_reads_its_magnitude(tmp_path) -> None:
    config = LoraConfig(target_modules="all-linear", use_dora=True, init_lora_weights=False)
    model = get_peft_model(nf4.quantize_model(make("Llama")), config).eval()
    magnitudes = [p for n, p in model.named_parameters() if "magnitude" in n]
    with torch.no_grad():
        for parameter in magnitudes:
            parameter.mul_(1.5)
        expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "dora")
    dense = nf4.quantize_model(make("Llama"))
    again = PeftModel.from_pretrained(dense, tmp_path / "dora", low_cpu_mem_usage=True).eval()
    with torch.no_grad():
        assert magnitudes and torch.equal(again(TOKENS).logits, expected)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_trainable_tokens_of_4_bit_embeddings_are_refused_by_name() -> None:
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    with pytest.raises(TypeError, match=r"4-bit weight of model\.embed_tokens; leave the layer"):
        get_peft_model(base(), config)
