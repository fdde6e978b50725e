"""Tiny random models of many architectures: quantized, adapted, merged, loaded; its table."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, inputs, logits, make
from helpers import error
from torch import nn

import nf4
from nf4.integrations.transformers import NF4Config
from nf4.layers.experts import ExpertsNF4, is_experts
from nf4.layers.linear import is_conv1d

PAGE = Path(__file__).resolve().parents[2] / "notebooks/guides/architectures.md"
KINDS = {"Linear": "nn.Linear", "Conv1D": "Conv1D", "experts": "experts"}


def kinds_of(model: nn.Module) -> Counter[str]:
    """Count the layers that hold a dense weight, by kind."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if is_experts(module):
            found["experts"] += 1
        elif is_conv1d(module):
            found["Conv1D"] += 1
        elif isinstance(module, nn.Linear):
            found["Linear"] += 1
    return found


# DeBERTa multiplies by in_proj.weight: test_selection.py has what is said of that
LEFT = pytest.mark.filterwarnings("ignore:.*2 in_proj, whose weight DisentangledSelfAttention")


@LEFT
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, tmp_path) -> None:
    dense = make(name)
    before = kinds_of(dense)
    dense.save_pretrained(tmp_path / "dense")
    loaded = (
        type(dense)
        .from_pretrained(tmp_path / "dense", dtype=torch.float32, quantization_config=NF4Config())
        .eval()
    )
    skipped = loaded.config.quantization_config.skip_modules
    model = nf4.quantize_model(copy.deepcopy(dense), skip_modules=skipped)
    left = kinds_of(model)
    quantized = before - left
    assert quantized and not left["Conv1D"] and not left["experts"]
    # On load, and afterwards, the same; and the same again from a file
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
    loaded.save_pretrained(tmp_path / "saved")
    again = type(dense).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again, name), logits(loaded, name))
    dense_left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    # The error is that of the weights alone
    ours = logits(model, name)
    merged = nf4.merge(copy.deepcopy(model))
    assert kinds_of(merged).total() == before.total()
    assert error(ours, logits(merged, name)) < 1e-5
    assert error(ours, logits(dense, name)) < 0.5
    # An adapter on every quantized layer, experts too
    nf4.add_lora(model, r=2)
    model.train()
    model(**inputs(name)).loss.backward()
    adapters = [m for m in model.modules() if isinstance(m, nf4.QLoRALinear)]
    experts = sum(m.num_experts for m in model.modules() if isinstance(m, ExpertsNF4))
    assert len(adapters) == quantized["Linear"] + quantized["Conv1D"] + 2 * experts
    assert all(m.lora_B.grad is not None and m.lora_B.grad.isfinite().all() for m in adapters)
    parts = [f"{count} {KINDS[kind]}" for kind, count in quantized.items()]
    names = {".".join(n.split(".")[-2:]) for n in dense_left}
    cells = (name, f"`{type(dense).__name__}`", " and ".join(parts), ", ".join(sorted(names)))
    row = "| " + " | ".join(cells) + " |"
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), f"{PAGE.name}: expected {row}"


TOKEN_MODELS = [name for name in ARCHITECTURES if name != "ViT"]


@LEFT
@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_embeddings_of_tokens_in_4_bits(name, tmp_path) -> None:
    """On load and afterwards the same; ties hold through files, and through merging."""
    dense = make(name)
    dense.save_pretrained(tmp_path / "dense")
    config = NF4Config(quantize_embeddings=True)
    model = type(dense).from_pretrained(
        tmp_path / "dense", dtype=torch.float32, quantization_config=config
    )
    ours = nf4.quantize_model(
        copy.deepcopy(dense),
        model.config.quantization_config.skip_modules,
        quantize_embeddings=True,
    )
    assert model.state_dict().keys() == ours.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    tokens, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(tokens, nf4.EmbeddingNF4)
    tied = dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert tied == (getattr(head, "packed", None) is tokens.packed)
    assert error(logits(model.eval(), name), logits(dense, name)) < 0.5
    model.save_pretrained(tmp_path / "saved")
    again = type(dense).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again, name), logits(model, name))
    head = again.get_output_embeddings()
    assert tied == (getattr(head, "packed", None) is again.get_input_embeddings().packed)
    merged = nf4.merge(again)
    assert type(merged.get_input_embeddings()) is type(dense.get_input_embeddings())
    head = merged.get_output_embeddings()
    assert tied == (head.weight is merged.get_input_embeddings().weight)
    assert error(logits(merged, name), logits(model, name)) < 1e-5


def test_experts_of_other_forms_are_left() -> None:
    experts = make("Mixtral").model.layers[0].mlp.experts
    assert is_experts(experts)
    for name in ("has_bias", "is_transposed", "has_post_expert_norm"):
        other = copy.copy(experts)
        setattr(other, name, True)
        assert not is_experts(other)
    other = copy.copy(experts)
    other.is_concatenated = False
    assert not is_experts(other)


def test_experts_that_are_not_finite_are_named() -> None:
    model = make("Qwen3-MoE")
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj: expected finite values"):
        nf4.quantize_model(model)
    assert kinds_of(model)["experts"] == 2, "unchanged"


def test_model_error_of_experts_has_a_row_a_weight() -> None:
    rows = {row.name: row for row in nf4.model_error(make("Mixtral"))}
    row = rows["model.layers.0.mlp.experts.gate_up_proj"]
    assert row.shape == (4, 192, 64) and row.kind == "gate_up_proj"
    assert 0.05 < row.error.relative < 0.15
