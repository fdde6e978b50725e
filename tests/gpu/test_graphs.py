"""CUDA graphs of quantized models, with and without adapters, in training and in decoding.

What is captured must compute, on new inputs, what is computed without a graph.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import nf4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
WARM = 3  # calls before a capture, as PyTorch asks
ADAPTERS = {
    "frozen": lambda model: model,
    "lora": lambda model: nf4.add_lora(model, r=8),
    "wide_lora": lambda model: nf4.add_lora(model, r=64),
    "dropout": lambda model: nf4.add_lora(model, r=8, lora_dropout=0.5),
    "ia3": lambda model: nf4.add_ia3(model, target_modules=["0", "2"], feedforward_modules=["2"]),
}


def stack(adapters: str = "lora", layers: int = 4, size: int = 512) -> nn.Module:
    """Return layers of one shape in bf16, quantized, with adapters whose terms are not zero."""
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for _ in range(layers):
        made += [nn.Linear(size, size, dtype=torch.bfloat16), nn.Tanh()]
    model = nf4.quantize_model(nn.Sequential(*made).to(DEVICE), skip_modules=())
    model = ADAPTERS[adapters](model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def inputs(rows: int, size: int = 512) -> list[Tensor]:
    return [torch.randn(rows, size, device=DEVICE).bfloat16() for _ in range(3)]


def captured(function):
    """Return a function's result, once it is warm, and what computes it anew in its place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return result, graph.replay


@pytest.mark.parametrize("adapters", ["frozen", "lora", "wide_lora", "ia3"])
@pytest.mark.parametrize("rows", [1, 2, 16, 100, 700])
def test_a_captured_model_computes_what_it_does_uncaptured(rows, adapters) -> None:
    model, xs = stack(adapters).eval(), inputs(rows)
    with torch.no_grad():
        expected = [model(x) for x in xs]
        given = xs[0].clone()
        found, replay = captured(lambda: model(given))
        for x, right in zip(xs, expected, strict=True):
            given.copy_(x)
            replay()
            assert torch.equal(found, right)
        assert torch.equal(model(xs[1]), expected[1])  # without a graph, as before


@pytest.mark.parametrize("adapters", ["lora", "wide_lora", "ia3"])
def test_a_captured_step_of_training_is_one(adapters) -> None:
    model, xs = stack(adapters).train(), inputs(300)
    eager = copy.deepcopy(model)

    def trainer(trained: nn.Module, given: Tensor):
        parameters = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=False)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = trained(given).float().square().mean()
            loss.backward()
            optimizer.step()
            return loss

        return step

    given = xs[0].clone()
    _, replay = captured(trainer(model, given))
    for x in xs:
        given.copy_(x)
        replay()
    own = xs[0].clone()
    step = trainer(eager, own)
    for x in [*[xs[0]] * WARM, *xs]:
        own.copy_(x)
        step()
    for ours, right in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("adapters", ["lora", "wide_lora"])
def test_graphed_callables_have_the_gradients_of_the_model(adapters) -> None:
    model, xs = stack(adapters).train(), inputs(300)
    eager = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(model, (xs[0].clone().requires_grad_(),))
    for x in xs:
        found = []
        for one in (graphed, eager):
            one.zero_grad()
            leaf = x.clone().requires_grad_()
            y = one(leaf)
            y.backward(torch.ones_like(y))
            grads = [p.grad for p in one.parameters() if p.grad is not None]
            found.append([y, leaf.grad, *grads])
        assert len(found[0]) == len(found[1]) > 2
        for ours, right in zip(*found, strict=True):
            assert torch.equal(ours, right)


def test_dropout_is_drawn_anew_in_each_replay() -> None:
    model, (x, *_) = stack("dropout").train(), inputs(300)
    y, replay = captured(lambda: model(x))
    replay()
    first = y.clone()
    replay()
    assert not torch.equal(first, y)


@pytest.mark.parametrize("adapters", ["frozen", "lora"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_graphs_compute_what_is_computed_eagerly(training, adapters) -> None:
    torch.compiler.reset()
    model, xs = stack(adapters).train(training), inputs(300)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for x in [*xs, *xs]:
        torch.compiler.cudagraph_mark_step_begin()
        found = []
        for one in (compiled, model):
            model.zero_grad()
            leaf = x.clone().requires_grad_(training)
            y = one(leaf)
            if training:
                y.backward(torch.ones_like(y))
            found.append([y.detach().clone(), leaf.grad])
        # Inductor may round tanh otherwise than eager does: to bf16 once, not twice
        (y, dx), (right, right_dx) = found
        assert torch.allclose(y.float(), right.float(), rtol=2**-6, atol=2**-6)
        if training:
            assert torch.allclose(dx.float(), right_dx.float(), rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize("adapters", ["frozen", "lora"])
def test_decoding_with_a_static_cache_gives_the_same_tokens(adapters, tiny_llama) -> None:
    torch.compiler.reset()
    model = tiny_llama(hidden_size=256, intermediate_size=512).to(DEVICE, torch.bfloat16)
    model = ADAPTERS[adapters](nf4.quantize_model(model)).eval()
    tokens = torch.arange(8, device=DEVICE)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    for _ in range(2):
        found = model.generate(tokens, cache_implementation="static", **options)
        assert torch.equal(found, expected)


def test_a_graph_holds_one_dense_weight_for_all_layers() -> None:
    """What each layer takes for itself under capture, the next one takes again."""
    size, layers = 2048, 6
    model, (x, *_) = stack("lora", layers, size).train(), inputs(1024, size)
    dense = 2 * size * size
    leaf = x.clone().requires_grad_()

    def step() -> None:
        y = model(leaf)
        y.backward(torch.ones_like(y))

    step()
    torch.cuda.synchronize()
    nf4.release_scratch()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    _, replay = captured(step)
    replay()
    taken = torch.cuda.memory_reserved() - before
    # Activations: of each layer its input and the product, in forward and backward
    activations = 2 * 1024 * size * (4 * layers + 4)
    assert taken < activations + 3 * dense < activations + layers * dense
