"""Products of layers that passed the checks once: what is then computed without asking again."""

import copy
import os
import threading
import weakref

import pytest
import torch

pytest.importorskip("triton", reason="nf4's kernels need Triton")

import nf4
from nf4.adapters.lora import LoRA
from nf4.bench.harness.pretended import pretended_gpu
from nf4.gpu import sequence
from nf4.gpu.plan import always
from nf4.ops import products, replay
from nf4.tools import streams

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)
Q = nf4.to_fragments(nf4.quantize(torch.randn(32, 256).bfloat16()))
SCALES = nf4.to_fragments(nf4.quantize(torch.randn(32, 256).bfloat16(), double_quant=False))
X = torch.randn(80, 256).bfloat16()


@pytest.fixture
def driver():
    with pretended_gpu() as driver, always("dequantize"):
        yield driver


def layer_of(q=Q, kind=nf4.QLoRALinear, **options):
    """Return a layer on a weight of its own, whose memory a test may do anything to."""
    own = q.with_parts([None if part is None else part.clone() for part in q.parts()])
    options = options or ({"r": 8} if kind is nf4.QLoRALinear else {})
    return kind.from_weight(own, torch.randn(32), **options).to_fragments()


@pytest.fixture
def checks(monkeypatch):
    """Return a list that grows with each product that is checked."""
    taken = []

    def counted(function):
        return lambda *args: taken.append(function.__name__) or function(*args)

    for name in ("_multiplied", "_multiplied_lora"):
        monkeypatch.setattr(products, name, counted(getattr(products, name)))
    return taken


def step(layer, x=X) -> torch.Tensor:
    """Compute forward and backward, and return the gradient of x."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    return x.grad


@pytest.mark.parametrize("q", [Q, SCALES], ids=["double_quant", "fp32_scales"])
@pytest.mark.parametrize("kind", [nf4.LinearNF4, nf4.QLoRALinear])
def test_a_product_is_checked_once(kind, q, driver, checks) -> None:
    layer = layer_of(q, kind)
    for rows in (80, 80, 81, 300):
        step(layer, torch.randn(rows, 256).bfloat16())
        step(layer, torch.randn(2, rows, 256).bfloat16())
    assert len(checks) == 1
    with torch.no_grad():  # another form, for nothing wants a gradient
        for _ in range(2):
            assert not layer(X).requires_grad
    assert len(checks) == 2


def test_adapters_of_peft_are_checked_once(driver, checks) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, inject_adapter_in_model

    import nf4.integrations.peft  # noqa: F401  makes PEFT know the layers

    model = torch.nn.Sequential(layer_of(kind=nf4.LinearNF4))
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["0"]), model)
    model.train()
    for _ in range(3):
        step(model)
    assert len(checks) == 1
    model[0].enable_adapters(False)
    step(model)
    model[0].enable_adapters(True)
    assert len(checks) == 2
    model[0].update_layer("other", 4, lora_alpha=8, config=LoraConfig(r=4))
    step(model)
    assert len(checks) == 2
    model[0].set_adapter(["default", "other"])
    step(model)
    assert len(checks) == 3
    model[0].set_adapter("default")
    called = []
    model[0].base_layer.register_forward_hook(lambda *args: called.append(args))
    step(model)
    assert len(called) == 1


WRONG = {
    "x_of_another_size": (lambda layer: None, torch.randn(80, 128).bfloat16(), "x: expected shape"),
    "x_of_no_dimensions": (lambda layer: None, torch.tensor(1.0).bfloat16(), "x: expected shape"),
    "x_of_integers": (lambda layer: None, torch.ones(80, 256).int(), "x: expected a floating"),
    "lora_A": (
        lambda layer: setattr(layer, "lora_A", torch.nn.Parameter(torch.ones(8, 128))),
        X,
        "lora_A: expected shape",
    ),
    "lora_B": (
        lambda layer: setattr(layer, "lora_B", torch.nn.Parameter(torch.ones(16, 8))),
        X,
        "lora_B: expected shape",
    ),
    "bias": (
        lambda layer: setattr(layer, "bias", torch.nn.Parameter(torch.ones(16))),
        X,
        "bias: expected shape",
    ),
    "packed": (
        lambda layer: setattr(layer.packed, "data", torch.empty(0, dtype=torch.int32)),
        X,
        "packed: expected shape",
    ),
    "part_of_packed": (
        lambda layer: setattr(layer.packed, "data", layer.packed.data[:16]),
        X,
        "packed: expected shape",
    ),
    "part_of_absmax": (
        lambda layer: setattr(layer.absmax, "data", layer.absmax.data[:3]),
        X,
        "absmax: expected shape",
    ),
    "absmax": (
        lambda layer: setattr(layer, "absmax", torch.nn.Parameter(torch.zeros(3).byte(), False)),
        X,
        "absmax: expected shape",
    ),
    "offset": (lambda layer: setattr(layer, "offset", None), X, "absmax2 and offset belong"),
    "gradient_of_scales": (lambda layer: layer.absmax2.requires_grad_(), X, "absmax2: expected a"),
    "block_size": (lambda layer: setattr(layer, "block_size", 128), X, "absmax: expected shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_though_it_was_right(name, driver) -> None:
    (spoil, x, message), layer = WRONG[name], layer_of()
    step(layer)
    step(layer)
    spoil(layer)
    with pytest.raises((TypeError, ValueError), match=message):
        layer(x)


def _offload(layer):
    layer.packed = torch.nn.Parameter(layer.packed.clone(), requires_grad=False)


CHANGES = {
    "packed": _offload,
    "absmax": lambda layer: setattr(
        layer, "absmax", torch.nn.Parameter(layer.absmax.clone(), requires_grad=False)
    ),
    "memory": lambda layer: setattr(layer.packed, "data", layer.packed.data.clone()),
    "rank": lambda layer: (
        layer.add_adapter("other", LoRA(layer.base(), 4, 8)),
        layer.set_adapter("other"),
    ),
    "scaling": lambda layer: setattr(layer, "lora_alpha", 3.0),
    "dropout": lambda layer: setattr(layer, "lora_dropout", 0.5),
    "frozen_A": lambda layer: layer.lora_A.requires_grad_(False),
    "frozen_B": lambda layer: layer.lora_B.requires_grad_(False),
    "dtype_of_A": lambda layer: setattr(layer.lora_A, "data", layer.lora_A.data.bfloat16()),
    "no_bias": lambda layer: setattr(layer, "bias", None),
    "half": lambda layer: layer.half(),
    "rows": lambda layer: layer.to_rows(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_checked_again(name, driver, checks) -> None:
    layer = layer_of()
    step(layer)
    step(layer)
    assert len(checks) == 1
    CHANGES[name](layer)
    step(layer)
    assert len(checks) == 2
    step(layer)
    assert len(checks) == (3 if name == "dropout" else 2)


def test_a_bias_that_is_computed_is_added(driver, checks) -> None:
    layer = nf4.LinearNF4.from_weight(layer_of().weight)
    step(layer)
    layer.bias = torch.nn.Parameter(torch.randn(32))
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", torch.nn.Tanh())
    step(layer)
    assert len(checks) == 2  # not what was remembered without a bias


def test_copies_are_checked_and_nothing_holds_a_layers_memory(driver, checks) -> None:
    layer = layer_of()
    step(layer)
    twin = copy.deepcopy(layer)
    step(twin)
    assert len(checks) == 2
    held = [weakref.ref(part) for part in (layer.packed, layer.absmax, layer.absmax2)]
    memory = layer.packed.untyped_storage()._weak_ref()
    for name in ("packed", "absmax", "absmax2"):
        setattr(layer, name, torch.nn.Parameter(getattr(layer, name).clone(), False))
    assert [part() for part in held] == [None] * 3
    assert torch.UntypedStorage._expired(memory)
    torch.UntypedStorage._free_weak_ref(memory)


def test_threads_share_what_is_known(driver, checks) -> None:
    layer = layer_of()
    step(layer)

    def beside() -> None:
        with always("dequantize"):
            step(layer)

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert len(checks) == 1


def test_devices_do_not_share_what_is_known(driver, checks, monkeypatch) -> None:
    layer = layer_of()
    step(layer)
    known = set(sequence._known)
    for name in ("gpu_index", "current_gpu"):
        monkeypatch.setattr(streams, name, lambda *args: 98)
    step(layer)
    assert len(checks) == 2
    new = set(sequence._known) - known
    assert new and {device for _, device, _ in new} == {98}


def test_a_tensor_of_another_device_than_the_current_goes_the_long_way(
    driver, checks, monkeypatch
) -> None:
    layer = layer_of()
    step(layer)
    monkeypatch.setattr(streams, "current_gpu", lambda: 98)
    step(layer)
    assert len(checks) == 2


def test_a_layer_that_is_quantized_again_is_checked_again(driver, checks) -> None:
    layer = layer_of()
    step(layer)
    layer._set_weight(nf4.to_fragments(SCALES))
    step(layer)
    assert len(checks) == 2


def test_a_moved_layer_is_checked_again(driver, checks) -> None:
    layer = layer_of()
    step(layer)
    layer.to("meta")
    assert not layer.__dict__.get("_replays")
    assert layer(X.to("meta")).is_meta
    layer.to_empty(device="cpu")
    step(layer)
    assert len(checks) == 3


def test_an_adapter_with_hooks_is_called(driver) -> None:
    layer, called = layer_of(), []
    step(layer)
    layer.lora.register_forward_pre_hook(lambda *args: called.append(args))
    for _ in range(2):
        step(layer)
    assert len(called) == 2


def test_transforms_and_autocast_go_the_long_way(driver, checks) -> None:
    layer = layer_of()
    step(layer)
    with torch.autocast("cpu", torch.bfloat16):
        step(layer)
    assert len(checks) == 1
    torch.func.vmap(layer)(torch.randn(2, 80, 256).bfloat16())
    assert len(checks) == 2
    x = torch.randn(80, 512).bfloat16()[:, ::2]
    step(layer, x)  # strided
    step(layer, torch._neg_view(X))
    assert len(checks) == 4


def test_gradients_are_those_wanted(driver) -> None:
    layer = layer_of()
    for wanted in ((True, True), (False, True), (True, False), (True, True)):
        layer.lora_A.requires_grad_(wanted[0])
        layer.lora_B.requires_grad_(wanted[1])
        for _ in range(2):
            layer.zero_grad()
            step(layer)
            found = (layer.lora_A.grad is not None, layer.lora_B.grad is not None)
            assert found == wanted


def test_few_products_are_remembered(driver, monkeypatch) -> None:
    monkeypatch.setattr(replay, "MOST", 4)
    layer = layer_of()
    for alpha in range(1, 12):
        layer.lora_alpha = float(alpha)
        step(layer)
    assert 0 < len(layer.replays()) <= 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [nf4.LinearNF4, nf4.QLoRALinear])
@pytest.mark.parametrize("rows", [1, 40, 600])
def test_checked_products_are_those_of_the_long_way(rows, kind, monkeypatch) -> None:
    q = nf4.quantize(torch.randn(96, 512, device="cuda").bfloat16())
    layer = kind.from_weight(q, torch.randn(96, device="cuda"))
    xs = [torch.randn(rows, 512, device="cuda").bfloat16().requires_grad_() for _ in range(3)]

    def computed():
        found = []
        for x in xs:
            y = layer(x)
            leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
            found += [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]
        return found

    computed()
    remembered = computed()
    layer.replays().clear()
    monkeypatch.setattr(replay, "remember", lambda *args: None)
    for ours, right in zip(remembered, computed(), strict=True):
        assert torch.equal(ours, right)
