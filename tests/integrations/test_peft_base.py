"""PEFT's layers on a base whose call does more than its product: hooks, forwards, offloading."""

import copy

import pytest
import torch
from helpers import error
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import nf4
import nf4.integrations.peft

CONFIGS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False),
    "dropout": lambda: LoraConfig(
        r=4, target_modules=["up", "down"], init_lora_weights=False, lora_dropout=0.5
    ),
    "dora": lambda: LoraConfig(
        r=4, target_modules=["up", "down"], init_lora_weights=False, use_dora=True
    ),
    "ia3": lambda: IA3Config(
        target_modules=["up", "down"], feedforward_modules=["down"], init_ia3_weights=False
    ),
}
X = torch.randn(5, 96)


@pytest.fixture
def models(block):
    """The same adapters on quantized layers and on the same weights dense."""

    def make(kind: str) -> list[nn.Module]:
        ours = nf4.quantize_model(block).eval()
        theirs = nf4.merge(copy.deepcopy(ours)).eval()
        found = []
        for base in (ours, theirs):
            torch.manual_seed(7)
            found.append(get_peft_model(base, CONFIGS[kind]()).eval())
            for name, p in found[-1].named_parameters():
                if "ia3" in name:
                    p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        return found

    return make


def base(model: nn.Module) -> nn.Module:
    return model.base_model.model.up.base_layer


def doubled(layer: nn.Module) -> None:
    """Replace a forward, as libraries do that patch layers."""
    old = layer.forward
    layer.forward = lambda x: 2 * old(x)


CHANGES = {
    "hook": lambda layer: layer.register_forward_hook(lambda m, args, y: y + 1),
    "pre_hook": lambda layer: layer.register_forward_pre_hook(lambda m, args: (3 * args[0],)),
    "forward": doubled,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_hooked_onto_the_base_happens_as_on_dense_layers(kind, change, models) -> None:
    ours, theirs = models(kind)
    plain = ours(X)
    for model in (ours, theirs):
        change(base(model))
    assert error(ours(X), theirs(X)) < 1e-5 and error(ours(X), plain) > 1e-3
    with ours.disable_adapter(), theirs.disable_adapter():
        assert error(ours(X), theirs(X)) < 1e-5


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_layers_run_the_hooks_of_their_base_too(kind, models) -> None:
    ours, _ = models(kind)
    seen = []
    base(ours).register_forward_hook(lambda m, args, y: seen.append(y.shape))
    expected = ours(X)
    ours.merge_adapter()
    assert error(ours.train()(X), expected) < 1e-5 and len(seen) == 2
    ours.eval().unmerge_adapter()
    assert torch.equal(ours(X), expected) and len(seen) == 3


def test_each_sample_by_an_adapter_of_its_own_runs_the_hooks_of_the_base(models) -> None:
    ours, theirs = models("lora")
    for model in (ours, theirs):
        torch.manual_seed(11)
        model.add_adapter("other", CONFIGS["lora"]())
        CHANGES["hook"](base(model))
    names = ["other", "__base__", "default", "other", "default"]
    found = [model(X, adapter_names=names) for model in (ours, theirs)]
    assert error(*found) < 1e-5


def test_backward_hooks_of_the_base_see_its_gradients(models) -> None:
    ours, _ = models("lora")
    seen = []
    base(ours).register_full_backward_hook(lambda m, dx, dy: seen.append((dx[0], dy[0].shape)))
    x = X.clone().requires_grad_()
    ours(x).sum().backward()
    ((dx, dy),) = seen
    assert dx is not None and dy == (5, 160)


def test_hooks_of_every_module_see_the_base(models) -> None:
    ours, _ = models("lora")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m)))
    with torch.no_grad():
        ours(X)
    handle.remove()
    assert seen.count(nf4.LinearNF4) == 2


def test_a_base_that_is_offloaded_is_brought_back_for_its_product(models) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    ours, _ = models("lora")
    expected = ours(X)
    layer = base(ours)
    weights = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    add_hook_to_module(layer, hook)
    assert layer.packed.is_meta
    assert torch.equal(ours(X), expected) or error(ours(X), expected) < 1e-6
    assert layer.packed.is_meta


def test_dora_on_an_offloaded_base_is_refused(models) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    ours, _ = models("dora")
    weights = {name: tensor.clone() for name, tensor in base(ours).state_dict().items()}
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    add_hook_to_module(base(ours), hook)
    with pytest.raises(ValueError, match="DoRA: expected the base weight on cpu, .* on meta: off"):
        ours(X)


def test_adapters_that_are_offloaded_are_brought_back_too(models) -> None:
    from accelerate import cpu_offload

    for model in models("lora"):
        expected = model(X)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.base_model.model.up.lora_A["default"].weight.is_meta
        assert error(model(X), expected) < 1e-6


def test_dora_that_is_offloaded_is_refused(models) -> None:
    from accelerate import cpu_offload

    ours, _ = models("dora")
    cpu_offload(ours, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="DoRA: expected its parameters on cpu, .* on meta: offl"):
        ours(X)


def test_adapters_that_nothing_brings_back_are_refused(block) -> None:
    from accelerate import cpu_offload

    offloaded = cpu_offload(nf4.quantize_model(block), execution_device=torch.device("cpu"))
    ours = get_peft_model(offloaded, CONFIGS["lora"]())  # which PEFT puts on meta, as the base is
    with pytest.raises(ValueError, match="lora_A: expected device cpu, .*, got meta"):
        ours(X)


def test_without_any_of_it_the_product_is_fused(models, monkeypatch) -> None:
    ours, _ = models("lora")
    monkeypatch.setattr(nf4.LinearNF4, "forward", lambda *_: pytest.fail("calls the base"))
    ours.base_model.model.lm_head = nn.Identity()
    ours(X)
