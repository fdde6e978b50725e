"""LoRA, QLoRA, T-Few's (IA)³ and AdaMix on the architectures they were made for; its table."""

import copy
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, inputs, logits, make
from helpers import error
from torch import nn

import nf4
from nf4.adapters.layer import adapted_layers

PAGE = Path(__file__).resolve().parents[2] / "notebooks/guides/architectures.md"
# How each is added, its learning rate, and whether its base is in four bits. Random weights are so
# small that factors beside one change little: they get a large rate.
METHODS = {
    "LoRA": (lambda m: nf4.add_lora(m, r=4, lora_alpha=8), 5e-3, False),
    "QLoRA": (lambda m: nf4.add_lora(m, r=4, lora_alpha=8), 5e-3, True),
    "T-Few": (nf4.add_ia3, 0.3, True),
    "AdaMix": (lambda m: nf4.add_adamix(m, r=4, lora_alpha=8), 1e-2, True),
}
NAMES = ("BERT", "RoBERTa", "DeBERTa", "DeBERTa-v2", "GPT-2", "GPT-J", "GPT-NeoX", "Llama")
STEPS = 16


def loss_of(model: nn.Module, method: str, name: str) -> torch.Tensor:
    """Return what a step lowers: the model's loss, for AdaMix of two forwards that are to agree."""
    first = model(**inputs(name))
    if method != "AdaMix":
        return first.loss
    second = model(**inputs(name))
    consistency = nf4.losses.consistency_loss(first.logits, second.logits)
    return (first.loss + second.loss) / 2 + consistency


def evaluate(model: nn.Module, name: str) -> float:
    with torch.no_grad():
        return model.eval()(**inputs(name)).loss.item()


def tune(name: str, method: str, folder: Path) -> int:
    """Train, save, reload and merge; return how many parameters were trained."""
    add, lr, quantized = METHODS[method]
    base = make(name)
    if quantized:
        nf4.quantize_model(base, skip_modules=("lm_head", "decoder", "embed_out"))
    model = add(copy.deepcopy(base))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = evaluate(model, name)
    assert before == pytest.approx(evaluate(base, name), rel=1e-5), "an adapter starts at the base"
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for _ in range(STEPS):
        model.train()
        loss_of(model, method, name).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate(model, name) < 0.99 * before
    if method == "AdaMix":
        mixed = logits(model, name)
        nf4.merge_adamix(model)
        assert error(logits(model, name), mixed) < 1e-5
    nf4.save_adapter(model, folder)
    again = copy.deepcopy(base)
    nf4.load_adapter(again, folder)
    assert torch.equal(logits(again, name), logits(model, name))
    # Sums in fp32 in another order, through a few layers
    merged = nf4.merge(copy.deepcopy(model))
    assert error(logits(merged, name), logits(model, name)) < 1e-5
    assert not adapted_layers(merged)
    dense = [n for n, _ in make(name).named_parameters()]
    assert [n for n, _ in merged.named_parameters()] == dense
    return sum(p.numel() for p in trained)


# One list of what to skip for all; and DeBERTa's in_proj, which stays dense
@pytest.mark.filterwarnings("ignore:skip_modules", "ignore:.*left dense are 2 in_proj")
@pytest.mark.parametrize("name", NAMES)
def test_methods_on_architecture(name, tmp_path) -> None:
    counts = [f"{tune(name, method, tmp_path / method):,}" for method in METHODS]
    total = sum(p.numel() for p in make(name).parameters())
    row = f"| {name} | `{ARCHITECTURES[name][0]}` | {total:,} | {' | '.join(counts)} |"
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), f"{PAGE.name}: expected {row}"
