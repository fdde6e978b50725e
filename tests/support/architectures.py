"""Tiny random models of many architectures, and what goes into them."""

import torch
import transformers
from torch import nn

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
GPT = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
ARCHITECTURES = {
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", GROUPED),
    "Gemma": ("GemmaForCausalLM", GROUPED),
    "GPT-2": ("GPT2LMHeadModel", {**GPT, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", TEXT),
    "GPT-J": ("GPTJForCausalLM", {**GPT, "rotary_dim": 8}),
    "BERT": ("BertForMaskedLM", {**TEXT, **NO_DROPOUT}),
    "RoBERTa": ("RobertaForMaskedLM", {**TEXT, **NO_DROPOUT, "pad_token_id": 0}),
    "DeBERTa": ("DebertaForMaskedLM", {**TEXT, **NO_DROPOUT, **DISENTANGLED}),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", {**TEXT, **NO_DROPOUT, **DISENTANGLED}),
    "ALBERT": ("AlbertForMaskedLM", {**TEXT, "embedding_size": 32}),
    "T5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 96,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
    "ViT": (
        "ViTForImageClassification",
        {**{k: v for k, v in TEXT.items() if k.startswith(("hidden", "num", "inter"))}}
        | {"image_size": 16, "patch_size": 8, "num_labels": 5},
    ),
    "Mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}


def make(name: str, **changes: object) -> nn.Module:
    kind, sizes = ARCHITECTURES[name]
    sizes = {**sizes, **{key: value for key, value in changes.items() if key in sizes}}
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**sizes)).eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "ViT":
        return {
            "pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16),
            "labels": torch.tensor([1, 2]),
        }
    tokens = 3 + torch.arange(24).view(2, 12)
    return {"input_ids": tokens, "labels": tokens}


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits
