"""torch.compile and torch.export of whole models; hooks and parametrizations around layers."""

import copy

import pytest
import torch
from helpers import error
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

import nf4
import nf4.integrations.peft

TOKENS = torch.arange(24).view(2, 12) % 320
ADAPTERS = {
    "peft_lora": lambda m: get_peft_model(m, LoraConfig(r=4, target_modules="all-linear")),
    "peft_dora": lambda m: get_peft_model(
        m, LoraConfig(r=4, target_modules=["up_proj"], use_dora=True)
    ),
    "peft_ia3": lambda m: get_peft_model(
        m, IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ),
    "lora": lambda m: nf4.add_lora(m, r=4),
    "dora": lambda m: nf4.add_lora(m, r=4, use_dora=True),
    "two": lambda m: nf4.add_lora(nf4.add_lora(m, r=4), r=2, adapter_name="second"),
}


@pytest.fixture
def base(tiny_llama) -> nn.Module:
    return nf4.quantize_model(tiny_llama(), skip_modules=(), quantize_embeddings=True)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_training_compiles_without_graph_breaks(adapters, base) -> None:
    """Forward and backward of the whole model in one graph each, the same as eager."""
    torch.manual_seed(0)
    model = adapters(base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    eager, compiled = (
        copy.deepcopy(model),
        torch.compile(model, fullgraph=True, backend="aot_eager"),
    )
    expected = eager(input_ids=TOKENS, labels=TOKENS)
    found = compiled(input_ids=TOKENS, labels=TOKENS)
    assert error(found.logits, expected.logits) < 1e-5
    expected.loss.backward()
    found.loss.backward()
    grads = {n: p.grad for n, p in eager.named_parameters() if p.grad is not None}
    assert grads
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in grads), name
        if name in grads:
            assert error(parameter.grad, grads[name]) < 1e-4, name


def test_generation_compiles_without_graph_breaks(base) -> None:
    model = nf4.add_lora(base, r=4).eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    eager = model.generate(TOKENS[:1], **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    compiled = model.generate(TOKENS[:1], cache_implementation="static", **options)
    assert torch.equal(compiled, eager)


def test_dropout_in_a_compiled_model_is_drawn_anew(base) -> None:
    model = nf4.add_lora(base, r=4, lora_dropout=0.5, target_modules=["up_proj"])
    for layer in model.modules():
        if isinstance(layer, nf4.QLoRALinear):
            nn.init.normal_(layer.lora_B)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        once, twice = compiled(TOKENS).logits, compiled(TOKENS).logits
    assert error(once, twice) > 1e-3


# Of transformers' own, when traced strictly
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_model_is_exported_for_inference(strict, base) -> None:
    model = nf4.add_lora(base, r=4).eval()
    inputs = {"input_ids": TOKENS, "use_cache": False}
    program = torch.export.export(model, (), inputs, strict=strict)
    with torch.no_grad():
        assert torch.equal(program.module()(**inputs).logits, model(**inputs).logits)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"nf4.embedding.default", "nf4.lora_linear.default"} <= names


# Of torch 2.11's own, when it loads a program
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_exported_layer_takes_any_number_of_rows(tmp_path) -> None:
    layer = nf4.LinearNF4(96, 80)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, (torch.randn(3, 96),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    x = torch.randn(7, 96)
    assert torch.equal(again(x), layer(x))


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_a_parametrized_adapter_is_computed_with() -> None:
    layer = nf4.QLoRALinear(96, 80, r=4)
    nn.init.normal_(layer.lora_B)
    x, plain = torch.randn(3, 96), nf4.linear
    base = plain(x, layer.weight, layer.bias)
    low = layer(x) - base
    parametrize.register_parametrization(layer.lora, "lora_B", Doubled())
    assert error(layer(x) - base, 2 * low) < 1e-5
    layer(x).sum().backward()
    assert layer.lora.parametrizations.lora_B.original.grad is not None
    parametrize.remove_parametrizations(layer.lora, "lora_B", leave_parametrized=False)
    assert error(layer(x) - base, low) < 1e-5


def test_a_parametrized_bias_is_computed_with() -> None:
    layer = nf4.LinearNF4(96, 80)
    x = torch.zeros(3, 96)
    bias = layer.bias.detach().clone()
    parametrize.register_parametrization(layer, "bias", Doubled())
    assert error(layer(x), (2 * bias).expand(3, 80)) < 1e-6


def test_hooks_run_and_may_change_what_they_see() -> None:
    layer, seen = nf4.QLoRALinear(96, 80, r=4), []
    x = torch.randn(3, 96, requires_grad=True)
    plain = layer(x)
    handles = [
        layer.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
        layer.register_forward_hook(lambda m, args, y: seen.append(y.shape) or -y),
        layer.register_full_backward_hook(lambda m, dx, dy: seen.append(dx[0].shape)),
    ]
    y = layer(x)
    y.sum().backward()
    assert error(y, layer.bias - 2 * (plain - layer.bias) - 2 * layer.bias) < 1e-5
    assert seen == [(3, 80), (3, 96)]
    for handle in handles:
        handle.remove()
    assert torch.equal(layer(x), plain)


def test_functions_are_traced_with_symbols_for_sizes() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    w = torch.randn(64, 128)
    traced = make_fx(lambda w: nf4.dequantize(nf4.quantize(w)), tracing_mode="symbolic")(w)
    assert torch.equal(traced(w), nf4.dequantize(nf4.quantize(w)))
