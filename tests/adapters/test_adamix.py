"""AdaMix: what is drawn, repeated and compiled, and the LoRA that is left of a mixture."""

import copy
import warnings

import pytest
import torch
from helpers import error
from kinds import TOKENS, logits, nf4_layers, randomize, with_kind
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

import nf4
from nf4.adapters.layer import adapted_layers
from nf4.adapters.term import KINDS
from nf4.models.adapt import adapter_names


@pytest.fixture
def base(biased_llama) -> nn.Module:
    return biased_llama


def draws(model: nn.Module, monkeypatch) -> list[int]:
    """Record the modules that forwards draw from now on."""
    seen, randint = [], torch.randint

    def recorded(*args, **options):
        drawn = randint(*args, **options)
        seen.append(drawn.item())
        return drawn

    monkeypatch.setattr(torch, "randint", recorded)
    return seen


def test_adamix_draws_a_and_b_apart_for_each_layer_and_forward(base, monkeypatch) -> None:
    model = with_kind(base, "adamix").train()
    randomize(model)
    seen = draws(model, monkeypatch)
    rounds = 60
    for _ in range(rounds):
        model(TOKENS)
    layers = len(adapted_layers(model))
    assert len(seen) == 2 * layers * rounds
    counts = torch.tensor(seen).view(-1, 2)
    joint = torch.bincount(4 * counts[:, 0] + counts[:, 1], minlength=16).double()
    expected = len(counts) / 16
    chi2 = ((joint - expected) ** 2 / expected).sum().item()
    assert chi2 < 44.3, "above the 99.99th percentile of chi-squared with 15 degrees of freedom"
    per_layer = counts.view(rounds, layers, 2)
    assert (per_layer != per_layer[:1]).any() and (per_layer[0] != per_layer[0, :1]).any()


def test_adamix_computes_what_it_drew(monkeypatch) -> None:
    layer = nf4.add_adamix(nf4.LinearNF4(64, 48), r=4, num_modules=3).train()
    mixture = layer.adapters["default"]
    nn.init.normal_(mixture.lora_B)
    seen, x = draws(layer, monkeypatch), torch.randn(5, 64)
    y = layer(x)
    y.sum().backward()
    i, j = seen
    low = (mixture.lora_A[i], mixture.lora_B[j], mixture.scaling)
    assert torch.equal(y, nf4.lora_linear(x, layer.weight, *low, layer.bias))
    for grad, drawn in ((mixture.lora_A.grad, i), (mixture.lora_B.grad, j)):
        assert [g.abs().max() > 0 for g in grad] == [m == drawn for m in range(3)]
    layer.eval()
    mean = (mixture.lora_A.mean(0), mixture.lora_B.mean(0), mixture.scaling)
    assert torch.equal(layer(x), nf4.lora_linear(x, layer.weight, *mean, layer.bias))
    assert len(seen) == 2, "nothing is drawn in evaluation"


def test_adamix_is_repeated_by_its_seed(base) -> None:
    model = with_kind(base, "adamix").train()
    randomize(model)
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        found.append(logits(model))
    assert torch.equal(found[0], found[1]) and error(found[2], found[0]) > 1e-4
    assert error(logits(model), logits(model)) > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_adamix_draws_again_alike_under_checkpointing(reentrant, base) -> None:
    """Also where another forward comes before backward, as the consistency loss has it."""
    model = with_kind(base, "adamix").train()
    randomize(model)
    grads = {}
    for checkpointed in (False, True):
        if checkpointed:
            options = {"use_reentrant": reentrant}
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a new name
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(3)
        first, second = model(TOKENS).logits, model(TOKENS).logits
        loss = nf4.losses.consistency_loss(first, second) + first.square().mean()
        loss.backward()
        grads[checkpointed] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, grad in grads[False].items():
        assert error(grads[True][name], grad) < 1e-5 or grad.abs().max() == 0, name


def test_adamix_compiles_once_for_all_draws(backend) -> None:
    layer = nf4.add_adamix(nf4.LinearNF4(64, 48), r=4).train()
    nn.init.normal_(layer.adapters["default"].lora_B)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(5, 64)
    compiled = torch.compile(layer, fullgraph=True, backend=counting)
    outputs = [compiled(x) for _ in range(12)]
    assert len(graphs) == 1
    assert any(error(y, outputs[0]) > 1e-3 for y in outputs)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    outputs = [compiled(x) for _ in range(12)]
    assert any(error(y, outputs[0]) > 1e-3 for y in outputs)
    mixture = layer.adapters["default"]
    pairs = [(a, b, mixture.scaling) for a in mixture.lora_A for b in mixture.lora_B]
    possible = [nf4.lora_linear(x, layer.weight, *pair, layer.bias) for pair in pairs]
    assert all(min(error(y, p) for p in possible) < 1e-5 for y in outputs)


def test_adamix_under_a_checkpoint_of_one_layer_is_compiled_too(backend) -> None:
    layer = nf4.add_adamix(nf4.LinearNF4(64, 64), r=4).train()
    nn.init.normal_(layer.adapters["default"].lora_B)
    x = torch.randn(5, 64, requires_grad=True)

    def step(x):
        return checkpoint(layer, x, use_reentrant=False).square().sum()

    compiled = torch.compile(step, backend=backend)
    compiled(x).backward()
    grad = layer.adapters["default"].lora_A.grad
    assert sum(g.abs().max().item() > 0 for g in grad) == 1


@pytest.mark.parametrize("share", [None, "A", "B"])
def test_merged_adamix_is_lora_in_peft_s_files(share, base, tmp_path) -> None:
    model = nf4.add_adamix(copy.deepcopy(base), r=4, lora_alpha=8, num_modules=3, share=share)
    randomize(model)
    expected = logits(model)
    model = nf4.merge_adamix(model)
    assert error(logits(model), expected) < 1e-6
    assert {type(a) for m in adapted_layers(model) for a in m.named_adapters().values()} <= {
        nf4.QLoRALinear,
        KINDS["LORA"],
    }
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        4 * (m.in_features + m.out_features) for m in adapted_layers(model)
    )
    nf4.save_adapter(model, tmp_path / "lora")
    plain = nf4.merge(copy.deepcopy(base)) if nf4_layers(base) else copy.deepcopy(base)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    assert error(logits(theirs), expected) < 1e-5
    assert error(logits(nf4.merge(model)), expected) < 1e-5


def test_merged_adamix_stays_beside_other_adapters(base) -> None:
    model = nf4.add_lora(copy.deepcopy(base), r=2, adapter_name="first")
    nf4.add_adamix(model, r=4, adapter_name="mixed")
    for name in ("first", "mixed"):
        randomize(model, name)
    nf4.set_adapter(model, ["first", "mixed"])
    expected = logits(model)
    nf4.merge_adamix(model, "mixed")
    assert adapter_names(model) == ["first", "mixed"]
    assert error(logits(model), expected) < 1e-6
    with pytest.raises(ValueError, match=r"expected mixtures called 'first' .*, found none"):
        nf4.merge_adamix(model, "first")
