"""Layers of one input, fused: launches, bits, and what is never taken for what was computed."""

import copy
import os
import pickle
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="nf4's kernels need Triton")

import nf4
from nf4.bench.harness.pretended import pretended_gpu
from nf4.layers import group as group_module
from nf4.layers.group import group_of
from nf4.ops import registry
from nf4.tools import streams
from nf4.tools.terms import LowRank

compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)
X = torch.randn(1, 1, 256).bfloat16()


def lora(model, **options):
    return nf4.add_lora(model, target_modules=["q_proj", "k_proj", "v_proj"], **options)


class Attention(nn.Module):
    """A query, a key and a value of one input, of two sizes."""

    def __init__(self, bias: bool = False, device: str = "cpu") -> None:
        super().__init__()
        with registry.computing("cpu", "reference"):  # values are wanted
            self._make(bias, device)

    def _make(self, bias: bool, device: str) -> None:
        for name, size in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
            dense = nn.Linear(256, size, bias, dtype=torch.bfloat16)
            layer = nf4.LinearNF4.from_linear(dense).to(device)
            setattr(self, name, layer.to_fragments())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def adapted(model: nn.Module, r: int = 8) -> nn.Module:
    with registry.computing("cpu", "reference"):
        model = lora(model, r=r)
    for layer in model.children():
        nn.init.normal_(layer.lora_B)
        layer.to_fragments()
    return model


@pytest.fixture
def driver():
    with pretended_gpu() as driver, torch.no_grad():
        yield driver


def launches(driver, model, x=X, times=3) -> list[int]:
    found = []
    for _ in range(times):
        before = driver.launches
        model(x.clone())
        found.append(driver.launches - before)
    return found


@compiled
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_three_layers_take_the_launches_of_one(rows, bias, driver) -> None:
    model, x = Attention(bias), X.expand(1, rows, 256).contiguous()
    assert launches(driver, model, x) == [3] * 3
    assert nf4.fuse_projections(model) is model
    assert launches(driver, model, x) == [1] * 3
    assert [y.shape for y in model(x)] == [(1, rows, n) for n in (64, 32, 32)]
    assert nf4.unfuse_projections(model) is model
    assert launches(driver, model, x) == [3] * 3


@compiled
def test_adapters_share_a_launch_too(driver) -> None:
    model = adapted(Attention())
    assert launches(driver, model) == [6] * 3
    nf4.fuse_projections(model)
    assert launches(driver, model) == [2] * 3


@compiled
def test_peft_s_layers_are_fused(driver) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, inject_adapter_in_model

    import nf4.integrations.peft  # noqa: F401  makes PEFT know the layers

    model = Attention()
    names = ["q_proj", "k_proj", "v_proj"]
    inject_adapter_in_model(LoraConfig(r=8, target_modules=names), model)
    assert launches(driver, model) == [6] * 3
    nf4.fuse_projections(model)
    assert launches(driver, model) == [2] * 3
    model.q_proj.enable_adapters(False)
    assert launches(driver, model) == [1 + 2 + 2] * 3


@compiled
@pytest.mark.parametrize("adapters", [False, True])
def test_a_token_of_a_llama_takes_fewer_launches(adapters, driver, tiny_llama) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 64}
    with registry.computing("cpu", "reference"):  # values are wanted
        model = nf4.quantize_model(tiny_llama(**sizes).bfloat16())
        model = nf4.add_lora(model, r=8) if adapters else model
    for module in model.modules():
        if isinstance(module, nf4.LinearNF4):
            module.to_fragments()
    tokens = torch.tensor([[1]])
    each = 2 if adapters else 1
    layers = model.config.num_hidden_layers

    def token() -> int:
        before = driver.launches
        model(tokens)
        return driver.launches - before

    token()
    assert token() == 7 * each * layers
    nf4.fuse_projections(model)
    token()
    assert token() == 4 * each * layers


@compiled
def test_each_output_is_fetched_once_and_for_the_very_input(driver) -> None:
    model = nf4.fuse_projections(Attention())
    group, x = group_of(model.q_proj), X.clone()
    model(x)
    assert group._held is None  # all were fetched

    def taken(function) -> int:
        before = driver.launches
        function()
        return driver.launches - before

    assert taken(lambda: model.q_proj(x)) == 1
    assert taken(lambda: model.k_proj(x)) == 0
    assert taken(lambda: model.k_proj(x)) == 1  # again: computed again, with the others
    assert taken(lambda: model.v_proj(x)) == 0
    assert taken(lambda: model.q_proj(x)) == 0
    assert taken(lambda: model.q_proj(x)) == 1
    x.add_(1)
    assert taken(lambda: model.k_proj(x)) == 1  # what was computed is not of this x
    assert taken(lambda: model.v_proj(x.clone())) == 1
    assert taken(lambda: model.q_proj(x)) == 1


@compiled
def test_nothing_is_held_of_an_input_or_a_model_that_is_gone(driver) -> None:
    model = nf4.fuse_projections(Attention())
    group, x = group_of(model.q_proj), X.clone()
    model.q_proj(x)
    gone = weakref.ref(x)
    held = [weakref.ref(y) for _, y in group._held.products.values()]
    del x
    assert gone() is None and group._held is None
    assert [y() for y in held] == [None] * 2
    assert launches(driver, model) == [1] * 3
    model.q_proj(X)
    layers = [weakref.ref(layer) for layer in model.children()]
    del model, group
    assert [layer() for layer in layers] == [None] * 3


@compiled
def test_a_query_alone_is_computed_alone_before_long(driver) -> None:
    """As where a key and a value are cached."""
    model = nf4.fuse_projections(Attention())
    for _ in range(6):
        model.q_proj(X.clone())
    grid = driver.arguments[0]
    assert grid == 64 // 16
    group_of(model.q_proj)._unfetched = 0
    model.q_proj(X.clone())
    assert driver.arguments[0] == (64 + 32 + 32) // 16


STALE = {
    "a_bias_in_place": lambda model, x: model.k_proj.bias.add_(1),
    "a_bias": lambda model, x: setattr(model.k_proj, "bias", nn.Parameter(torch.ones(32))),
    "a_weight": lambda model, x: model.k_proj._set_weight(model.v_proj.weight),
    "a_scale": lambda model, x: model.k_proj.absmax2.mul_(2),
    "lora_B": lambda model, x: model.k_proj.lora_B.add_(1),
    "an_input_s_memory": lambda model, x: setattr(x, "data", x.data.clone()),
    "an_input": lambda model, x: x.add_(1),
    "a_hook": lambda model, x: model.k_proj.register_forward_pre_hook(lambda *args: None),
    "an_alpha": lambda model, x: setattr(model.k_proj, "lora_alpha", 3.0),
}


@compiled
@pytest.mark.parametrize("name", STALE)
def test_a_product_of_what_was_is_not_returned(name, driver) -> None:
    model = nf4.fuse_projections(adapted(Attention(True)))
    launches(driver, model)
    x = X.clone()
    model.q_proj(x)
    STALE[name](model, x)
    before = driver.launches
    model.k_proj(x)
    assert driver.launches - before >= 2


@compiled
def test_a_product_of_another_stream_or_mode_is_not_returned(driver, monkeypatch) -> None:
    model, x = nf4.fuse_projections(Attention()), X.clone()

    def taken(context) -> int:
        model.q_proj(x)
        before = driver.launches
        with context:
            model.k_proj(x)
        return driver.launches - before

    assert taken(nullcontext()) == 0
    model.v_proj(x)
    with monkeypatch.context() as patch:
        model.q_proj(x)
        patch.setattr(streams, "current_stream", lambda device: 7)
        before = driver.launches
        model.k_proj(x)
        assert driver.launches - before == 1
    assert taken(FlopCounterMode(display=False)) == 1
    found = []
    model.q_proj(x)
    thread = threading.Thread(target=lambda: found.append(model.k_proj(x)))
    before = driver.launches
    thread.start()
    thread.join()
    assert found and driver.launches - before == 1


@compiled
def test_inference_mode_and_no_rows_are_computed_alone(driver) -> None:
    model = nf4.fuse_projections(adapted(Attention()))
    before = driver.launches
    assert [y.shape for y in model(torch.empty(1, 0, 256).bfloat16())] == [
        (1, 0, n) for n in (64, 32, 32)
    ]
    assert driver.launches == before
    with torch.inference_mode():
        assert launches(driver, model) == [6] * 3
        model.k_proj.bias = nn.Parameter(torch.ones(32), requires_grad=False)
    x = X.clone()
    assert [layer(x).shape for layer in model.children()] == [(1, 1, n) for n in (64, 32, 32)]


@compiled
def test_what_is_no_tensor_is_refused_as_ever(driver) -> None:
    model = nf4.fuse_projections(Attention())
    for wrong in ([1.0], torch.nn.Parameter(torch.randn(1, 128).bfloat16()), None):
        with pytest.raises((TypeError, ValueError), match="x: expected"):
            model.q_proj(wrong)


@compiled
def test_outputs_may_be_written_to(driver) -> None:
    model = nf4.fuse_projections(Attention())
    for _ in range(2):
        w = torch.ones(32, requires_grad=True)
        x = X.clone()
        y = [model.q_proj(x), model.k_proj(x)][1]
        with torch.enable_grad():
            y.add_(w)
        assert y.requires_grad


@compiled
def test_a_bias_that_is_computed_is_added_alone(driver) -> None:
    model = Attention(True)
    torch.nn.utils.parametrize.register_parametrization(model.k_proj, "bias", nn.Tanh())
    nf4.fuse_projections(model)
    assert launches(driver, model) == [3] * 3


@compiled
def test_layers_that_differ_cost_little(driver, monkeypatch) -> None:
    """A query and a value with adapters, as PEFT's default has them."""
    model = Attention()
    with registry.computing("cpu", "reference"):
        model = nf4.add_lora(model, target_modules=["q_proj", "v_proj"], r=8)
    for layer in model.children():
        layer.to_fragments()
    nf4.fuse_projections(model)
    asked = []
    monkeypatch.setattr(group_module, "_ready", lambda *args: asked.append(args))
    assert launches(driver, model) == [5] * 3
    assert not asked


@compiled
def test_a_moved_layer_forgets_launches(driver) -> None:
    model = nf4.fuse_projections(Attention())
    launches(driver, model)
    group = group_of(model.q_proj)
    assert group._replays
    model.to("meta")
    assert not group._replays


@compiled
def test_compiled_layers_are_not_compiled_again_for_what_is_remembered(driver) -> None:
    torch.compiler.reset()
    model = Attention()
    compiled_model = torch.compile(model.q_proj, backend="eager", fullgraph=True)
    for rows in range(1, 14):
        model.q_proj(torch.randn(rows, 256).bfloat16())
        compiled_model(X)


@compiled
def test_what_is_unusual_is_computed_alone(driver) -> None:
    model = nf4.fuse_projections(Attention())
    x = X.clone()
    assert launches(driver, model) == [1] * 3
    with torch.enable_grad():
        assert launches(driver, model) == [3] * 3
    assert launches(driver, model, torch.randn(1, 3, 256).bfloat16()) == [3] * 3
    assert launches(driver, model, X.float()) != [1] * 3
    handle = model.k_proj.register_forward_pre_hook(lambda *args: None)
    assert launches(driver, model) == [3] * 3
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert launches(driver, model) == [3] * 3
    handle.remove()
    assert launches(driver, model) == [1] * 3
    packed = model.k_proj.packed
    model.k_proj.packed = nn.Parameter(packed.to("meta"), requires_grad=False)
    model.q_proj(x)
    model.k_proj.packed = packed
    assert launches(driver, model) == [1] * 3
    del model.k_proj
    before = driver.launches
    model.q_proj(x)
    model.v_proj(x)
    assert driver.launches - before == 2


@compiled
def test_other_streams_are_computed_at_once_but_not_remembered(driver, monkeypatch) -> None:
    """As a CUDA graph captures them."""
    model = nf4.fuse_projections(Attention())
    monkeypatch.setattr(streams, "current_stream", lambda device: 7)
    assert launches(driver, model) == [1] * 3
    assert not group_of(model.q_proj)._replays


@compiled
def test_adapters_that_differ_are_computed_alone(driver) -> None:
    model = adapted(Attention())
    nf4.fuse_projections(model)
    x = X.clone()
    model.q_proj(x)
    model.k_proj.lora_alpha = 3.0  # after its product was computed
    before = driver.launches
    model.k_proj(x)
    assert driver.launches - before == 2
    assert launches(driver, model) == [2] * 3
    model.v_proj.add_adapter("other", type(model.v_proj.lora)(model.v_proj.base(), 4, 8))
    model.v_proj.set_adapter("other")
    assert launches(driver, model) == [6] * 3
    model.v_proj.set_adapter("default")
    assert launches(driver, model) == [2] * 3
    model.v_proj.lora_A.data = model.v_proj.lora_A.data.bfloat16()
    assert launches(driver, model) == [6] * 3


@compiled
def test_weights_that_lie_elsewhere_are_read_there(driver) -> None:
    model = nf4.fuse_projections(Attention())
    launches(driver, model)
    model.v_proj.packed.data = model.v_proj.packed.data.clone()
    model(X)
    assert model.v_proj.packed.data_ptr() in [
        a.data_ptr() if isinstance(a, torch.Tensor) else a for a in driver.arguments
    ]


@compiled
def test_copies_are_not_fused_and_threads_do_not_meet(driver) -> None:
    model = nf4.fuse_projections(Attention())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert group_of(twin.q_proj) is None
        assert launches(driver, twin) == [3] * 3
    shallow = copy.copy(model.k_proj)  # which is no member
    x = X.clone()
    assert shallow(x).shape == (1, 1, 32)
    found = []

    def beside() -> None:
        with torch.no_grad():
            found.append(launches(driver, model))

    model.q_proj(x)
    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert found == [[1] * 3]
    assert set(nf4.fuse_projections(model).state_dict()) == set(Attention().state_dict())


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("rows", [1, 2])
def test_one_launch_has_the_bits_of_one_each(rows, emulate) -> None:
    from nf4.gpu import linear, lora_linear
    from nf4.gpu.row_group import linear_group

    made = [nf4.quantize(torch.randn(n, 256)) for n in (32, 16, 16)]
    weights = [nf4.to_fragments(q).as_weight() for q in made]
    biases = [torch.randn(w.shape[0]) for w in weights]
    x = torch.randn(1, rows, 256).bfloat16()
    with registry.computing("cpu", "cuda"):
        for w, b, y in zip(weights, biases, linear_group(x, weights, biases), strict=True):
            assert torch.equal(y, linear.linear(x, w, b))
        updates = [
            LowRank(torch.randn(8, 256), torch.randn(w.shape[0], 8), 0.5 + i)
            for i, w in enumerate(weights)
        ]
        ys = linear_group(x, weights, biases, updates)
        for w, b, update, y in zip(weights, biases, updates, ys, strict=True):
            assert torch.equal(y, lora_linear.lora_linear(x, w, update, b, False)[0])
        assert linear_group(torch.randn(3, 256).bfloat16(), weights, biases) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("adapters", [False, True])
def test_fused_layers_compute_what_they_do_alone(adapters) -> None:
    model = Attention(True, "cuda")
    model = adapted(model) if adapters else model
    xs = [torch.randn(1, rows, 256, device="cuda").bfloat16() for rows in (1, 2, 1, 2)]
    with torch.no_grad():
        alone = [model(x) for x in xs]
        nf4.fuse_projections(model)
        for _ in range(3):
            for x, right in zip(xs, alone, strict=True):
                for y, expected in zip(model(x), right, strict=True):
                    assert torch.equal(y, expected)


class Properties(nn.Module):
    """A module with a property of a layer's name, which is not to be asked."""

    @property
    def query(self) -> None:
        """Raise."""
        raise RuntimeError("asked")


WRONG = {
    "no_module": (lambda: nf4.fuse_projections(3), TypeError, "model: expected a torch.nn.Module"),
    "dense": (
        lambda: nf4.fuse_projections(nn.Linear(4, 4)),
        ValueError,
        "expected 4-bit layers of one input, named q_proj, k_proj, v_proj; .*, got none in Linear",
    ),
    "a_string": (
        lambda: nf4.fuse_projections(Attention(), "q_proj"),
        TypeError,
        "projections: expected lists of names, got 'q_proj'",
    ),
    "a_list_of_names": (
        lambda: nf4.fuse_projections(Attention(), ["q_proj", "k_proj"]),
        TypeError,
        "projections: expected a list of names, got 'q_proj'",
    ),
    "numbers": (
        lambda: nf4.fuse_projections(Attention(), [[1, 2]]),
        TypeError,
        "projections: expected names, got",
    ),
    "one": (
        lambda: nf4.fuse_projections(Attention(), [["q_proj"]]),
        ValueError,
        "projections: expected two or three different names, got",
    ),
    "twice": (
        lambda: nf4.fuse_projections(Attention(), [["q_proj", "q_proj"]]),
        ValueError,
        "projections: expected two or three different names, got",
    ),
    "properties": (
        lambda: nf4.fuse_projections(Properties(), [["query", "key"]]),
        ValueError,
        "got none in Properties",
    ),
    "not_fused": (
        lambda: nf4.unfuse_projections(Attention()),
        ValueError,
        "model: expected one of `nf4.fuse_projections`, got Attention without fused layers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()
