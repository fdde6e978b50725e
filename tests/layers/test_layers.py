"""LinearNF4 and QLoRALinear: a drop-in for nn.Linear that keeps its bytes."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nf4

FROZEN = ("packed", "absmax", "absmax2", "offset")


def make(kind=nf4.LinearNF4, **options) -> nf4.LinearNF4:
    return kind(96, 80, **options)


def frozen_bytes(layer: nf4.LinearNF4) -> list[tuple[torch.dtype, bytes]]:
    held = [getattr(layer, name) for name in FROZEN if getattr(layer, name) is not None]
    return [(t.dtype, t.detach().numpy().tobytes()) for t in held]


@pytest.mark.parametrize("part", ["absmax", "absmax2", "offset"])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_scales_that_are_not_finite_are_not_loaded(part, bad) -> None:
    double = part != "absmax"
    model = nf4.quantize_model(nn.Sequential(*make_dense(2)), double_quant=double)
    loaded = copy.deepcopy(model).state_dict()
    loaded["0.packed"].add_(1)
    loaded[f"1.{part}"].fill_(bad)
    before = frozen_bytes(model[0]) + frozen_bytes(model[1])
    for target in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=f"1.{part}: expected finite values, got NaN or an"):
            target.load_state_dict(loaded)
        assert frozen_bytes(target[0]) + frozen_bytes(target[1]) == before
    layer = model[1]
    with pytest.raises(RuntimeError, match=f"{part}: expected finite values"):
        layer.load_state_dict({k.removeprefix("1."): v for k, v in loaded.items() if k[0] == "1"})


def test_each_layer_looks_at_its_own_entries_of_a_state_dict(monkeypatch) -> None:
    model = nf4.quantize_model(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))))
    looked, errors_in = [], nf4.LinearNF4.errors_in
    monkeypatch.setattr(
        nf4.LinearNF4,
        "errors_in",
        lambda self, held, prefix: (looked.append(sorted(held)), errors_in(self, held, prefix))[1],
    )
    model.load_state_dict(model.state_dict())
    own = [[f"{i}.{name}" for name in sorted((*FROZEN, "bias"))] for i in range(8)]
    assert looked == own + own  # all before the first is changed, and each again by itself


def make_dense(count: int) -> list[nn.Module]:
    return [nn.Linear(96, 80), nn.Linear(80, 96)][:count]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_from_linear_computes_with_the_dequantized_weight(dtype, bias) -> None:
    dense = nn.Linear(96, 80, bias=bias, dtype=dtype).eval()
    layer = nf4.LinearNF4.from_linear(dense)
    x = torch.randn(4, 96).to(dtype)
    w = nf4.dequantize(nf4.quantize(dense.weight))
    assert layer(x).dtype == dtype and not layer.training
    assert torch.equal(layer(x), nf4.linear(x, nf4.quantize(dense.weight), dense.bias))
    assert torch.equal(layer.to_linear().weight, w)
    assert torch.equal(nf4.dequantize(layer.weight), w)


def test_from_linear_takes_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(80, 96)
    layer = nf4.LinearNF4.from_linear(conv)
    x = torch.randn(4, 96)
    assert (layer.in_features, layer.out_features) == (96, 80)
    assert torch.equal(layer.weight.packed, nf4.quantize(conv.weight.T).packed)
    assert (layer(x) - conv(x)).norm() < 0.2 * conv(x).norm()


def test_constructor_initializes_like_linear() -> None:
    torch.manual_seed(5)
    layer = nf4.LinearNF4(96, 80)
    torch.manual_seed(5)
    dense = nn.Linear(96, 80)
    assert torch.equal(layer.weight.packed, nf4.quantize(dense.weight).packed)
    assert torch.equal(layer.bias, dense.bias)


def test_calls_like_linear() -> None:
    layer, x = nf4.LinearNF4(96, 80, True, "cpu", torch.float32), torch.randn(2, 96)
    assert torch.equal(layer(input=x), layer(x))
    q, bias = layer.weight, torch.randn(80)
    assert torch.equal(nf4.LinearNF4.from_weight(q, bias).state_dict()["bias"], bias)


def test_weight_is_frozen_and_only_the_adapter_and_bias_train() -> None:
    layer = make(nf4.QLoRALinear)
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"adapters.default.lora_A", "adapters.default.lora_B", "bias"}
    nn.init.normal_(layer.lora_B)
    layer(torch.randn(3, 96)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == trainable


def test_qlora_first_output_equals_the_base_s() -> None:
    dense = nn.Linear(96, 80)
    base = nf4.LinearNF4.from_linear(dense)
    layer = nf4.QLoRALinear.from_linear(dense, r=4, lora_alpha=8, lora_dropout=0.5)
    x = torch.randn(7, 96)
    assert (layer.lora_B == 0).all() and layer.lora_A.abs().max() > 0
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2)])
def test_qlora_scaling_and_merge(rslora, scaling) -> None:
    layer = nf4.QLoRALinear(96, 80, r=4, lora_alpha=8, use_rslora=rslora)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 96)
    assert layer.scaling == scaling
    w = nf4.dequantize(layer.weight) + scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ w.T + layer.bias)
    torch.testing.assert_close(layer.to_linear()(x), layer(x))
    assert torch.equal(layer.to_base()(x), nf4.linear(x, layer.weight, layer.bias))


def test_merge_of_bf16_rounds_once() -> None:
    layer = nf4.QLoRALinear(96, 80, r=4, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    exact = nf4.dequantize(layer.weight, torch.float64)
    exact += layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    merged = layer.to_linear().weight
    assert merged.dtype == torch.bfloat16
    # Half a bf16 step is at most 2^-8 of the value; the fp32 sum of 5 terms below 8 adds 2^-19.
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 2**-19).all()


def test_dropout_only_in_training() -> None:
    layer = nf4.QLoRALinear(96, 80, r=4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 96)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", [nf4.LinearNF4, nf4.QLoRALinear])
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.half().float(),
    ],
    ids=["half", "bfloat16", "double", "to_dtype", "to_device_dtype", "deepcopy", "pickle", "back"],
)
def test_packed_bytes_and_scales_survive(kind, double_quant, change) -> None:
    layer = nn.Sequential(make(kind, double_quant=double_quant))
    before = frozen_bytes(layer[0])
    after = change(layer)[0]
    assert frozen_bytes(after) == before
    assert len(before) == (4 if double_quant else 2)
    assert torch.equal(after.packed, layer[0].packed)


def test_casting_changes_bias_and_dtype_as_in_linear() -> None:
    layer = make().bfloat16()
    assert layer.bias.dtype == torch.bfloat16 and layer.dtype == torch.bfloat16
    assert layer(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16
    assert layer.to_linear().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [nf4.LinearNF4, nf4.QLoRALinear])
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("how", ["copy", "assign", "meta_assign", "to_empty"])
def test_state_dict_round_trips_strictly(kind, double_quant, how) -> None:
    torch.use_deterministic_algorithms(False)
    source = make(kind, double_quant=double_quant)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    device = "meta" if how in ("meta_assign", "to_empty") else "cpu"
    target = make(kind, double_quant=double_quant, device=device)
    if how == "to_empty":
        target = target.to_empty(device="cpu")
    target.load_state_dict(state, strict=True, assign=how in ("assign", "meta_assign"))
    x = torch.randn(3, 96)
    assert torch.equal(target(x), source(x))
    assert frozen_bytes(target) == frozen_bytes(source)
    assert not target.packed.requires_grad


def test_state_dict_keys_are_the_documented_ones() -> None:
    keys = list(make(nf4.QLoRALinear).state_dict())
    own = ["packed", "absmax", "bias", "absmax2", "offset"]
    assert keys == [*own, "adapters.default.lora_A", "adapters.default.lora_B"]


def test_fp32_scales_are_buffers_and_what_is_packed_parameters() -> None:
    """So that sharded training may cast parameters, and scales keep their values."""
    layer = make(nf4.LinearNF4, bias=False)
    assert set(dict(layer.named_parameters())) == {"packed", "absmax"}
    assert set(dict(layer.named_buffers())) == {"absmax2", "offset"}
    again = nf4.LinearNF4.from_weight(layer.weight)
    for name in ("packed", "absmax", "absmax2", "offset"):
        assert getattr(again, name) is getattr(layer, name)
    plain = make(nf4.LinearNF4, bias=False, double_quant=False)
    assert set(dict(plain.named_parameters())) == {"packed", "absmax"}
    assert not list(plain.buffers())


def test_pickles_with_all_parts_as_parameters_still_load() -> None:
    layer, other = make(nf4.LinearNF4), make(nf4.LinearNF4)
    state = copy.deepcopy(layer.__getstate__())
    for name in ("absmax2", "offset"):
        scales = state["_buffers"].pop(name)
        state["_parameters"][name] = torch.nn.Parameter(scales, requires_grad=False)
    other.__setstate__(state)
    assert frozen_bytes(other) == frozen_bytes(layer)
    assert set(dict(other.named_buffers())) == {"absmax2", "offset"}
    x = torch.randn(2, layer.in_features)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"adapter_name": "en"}], ids=str)
def test_state_dicts_with_the_adapter_among_the_layer_s_own_still_load(options) -> None:
    layers = [make(nf4.QLoRALinear, **options) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.Identity())
    nn.init.normal_(layers[0].lora_B)
    inside = f"adapters.{layers[0].adapter_name}."
    old = {name.replace(inside, ""): t for name, t in model.state_dict().items()}
    assert "0.lora_A" in old and not any("adapters" in name for name in old)
    found = nn.Sequential(layers[1], nn.Identity())
    found.load_state_dict(old)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_what_is_the_adapter_s_is_the_layer_s_too() -> None:
    layer = make(nf4.QLoRALinear, r=4, lora_alpha=8)
    adapter = layer.adapters["default"]
    assert layer.lora is adapter and list(layer.named_adapters()) == ["default"]
    assert layer.lora_A is adapter.lora_A and layer.lora_B is adapter.lora_B
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.lora_dropout) == (4, 8, 2.0, 0.0)
    layer.lora_dropout = 0.25
    layer.lora_B = nn.Parameter(torch.ones_like(layer.lora_B))
    assert adapter.lora_dropout == 0.25 and (adapter.lora_B == 1).all()
    assert "lora_B" not in vars(layer) and "lora_B" not in layer._parameters
    del layer.adapters["default"]
    with pytest.raises(AttributeError, match="'QLoRALinear' object has no attribute 'lora_A'"):
        layer.lora_A  # noqa: B018
    assert not hasattr(layer, "lora_B") and getattr(layer, "r", None) is None


def test_pickles_with_the_adapter_among_the_layer_s_own_still_load() -> None:
    layer = make(nf4.QLoRALinear, r=4, lora_alpha=8, lora_dropout=0.1)
    nn.init.normal_(layer.lora_B)
    old = layer.__getstate__()
    adapter = old["_modules"].pop("adapters")["default"]
    old["_parameters"] = {**old["_parameters"], **adapter._parameters}
    old |= {**adapter.options, "adapters": None}
    other = nf4.QLoRALinear.__new__(nf4.QLoRALinear)
    other.__setstate__(old)
    x = torch.randn(3, 96)
    layer.eval(), other.eval()
    assert torch.equal(other(x), layer(x)) and other.lora_dropout == 0.1
    assert other.state_dict().keys() == layer.state_dict().keys()


REPLACED = {
    "scales_of_another_size": lambda m: setattr(m, "absmax", frozen(m.absmax[:3])),
    "bytes_of_another_size": lambda m: setattr(m, "packed", frozen(m.packed[:2])),
    "no_offset": lambda m: setattr(m, "offset", None),
    "another_dtype": lambda m: setattr(m, "absmax2", frozen(m.absmax2.half())),
    "emptied": lambda m: setattr(m.packed, "data", torch.empty(0, dtype=torch.uint8)),
    "block_size": lambda m: setattr(m, "block_size", 48),
}


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED.keys())
@pytest.mark.parametrize("kind", [nf4.LinearNF4, nf4.QLoRALinear])
def test_parts_that_were_replaced_and_do_not_fit_are_refused(kind, replace) -> None:
    layer, x = make(kind), torch.randn(3, 96)
    layer(x)
    replace(layer)
    with pytest.raises((TypeError, ValueError), match="q"):
        layer(x)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"double_quant": False}, "absmax: expected torch.uint8"),
        ({"block_size": 128}, r"absmax: expected torch.uint8 \(120,\) \(block_size=64"),
    ],
    ids=["single", "block_size"],
)
def test_state_dict_quantized_otherwise_is_refused_untouched(source, message) -> None:
    state = make(**source).state_dict()
    layer = make()
    before = frozen_bytes(layer)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert frozen_bytes(layer) == before
    with pytest.raises(RuntimeError, match="absmax2: expected none"):
        make(double_quant=False).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant) -> None:
    grads = []
    for run in (False, True):
        torch.manual_seed(2)
        layer = nf4.QLoRALinear(96, 80, r=4, lora_dropout=0.2)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(5, 96, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=reentrant) if run else layer(x)
        y.square().sum().backward()
        grads.append([x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_gives_the_same_gradients_within_rounding() -> None:
    layer = nf4.QLoRALinear(96, 80, r=4)
    nn.init.normal_(layer.lora_B)
    x, dy = torch.randn(64, 96), torch.randn(64, 80)
    parameters = [layer.lora_A, layer.lora_B, layer.bias]
    plain = torch.autograd.grad(layer(x), parameters, dy)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    cast = torch.autograd.grad(y, parameters, dy.bfloat16())
    assert y.dtype == torch.bfloat16
    for a, b in zip(plain, cast, strict=True):
        assert (a - b).norm() < 4 * 2**-8 * a.norm(), "a few bf16 roundings of 2^-9 each"


@pytest.mark.parametrize("kind", [nf4.LinearNF4, nf4.QLoRALinear])
def test_layer_compiles_without_graph_breaks(kind) -> None:
    layer = make(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96, requires_grad=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert x.grad is not None and layer.bias.grad is not None


def test_print_describes_the_layer() -> None:
    text = repr(nf4.QLoRALinear(96, 80, r=4, lora_alpha=8))
    assert "in_features=96, out_features=80, bias=True, block_size=64" in text
    assert "r=4, lora_alpha=8" in text


BAD = {
    "in_features": (lambda: nf4.LinearNF4(0, 4), ValueError, "in_features: expected an int"),
    "out_features": (lambda: nf4.LinearNF4(4, 2.0), TypeError, "out_features: expected an int"),
    "dtype": (
        lambda: nf4.LinearNF4(4, 4, dtype=torch.float64),
        TypeError,
        "dtype: expected dtype float32, float16 or bfloat16, got torch.float64",
    ),
    "block_size": (lambda: nf4.LinearNF4(4, 4, block_size=7), ValueError, "got 7"),
    "in_features_bool": (lambda: nf4.LinearNF4(True, 4), TypeError, "expected an int, got bool"),
    "from_weight_tensor": (
        lambda: nf4.LinearNF4.from_weight(torch.zeros(4, 4)),
        TypeError,
        "q: expected an NF4Tensor",
    ),
    "from_weight_3d": (
        lambda: nf4.LinearNF4.from_weight(nf4.quantize(torch.zeros(2, 3, 4))),
        ValueError,
        r"q: expected a quantized matrix \[N, K\], got shape \(2, 3, 4\)",
    ),
    "from_weight_bias": (
        lambda: nf4.LinearNF4.from_weight(nf4.quantize(torch.zeros(3, 4)), torch.zeros(4)),
        ValueError,
        r"bias: expected shape \(3,\), got \(4,\)",
    ),
    "r_zero": (lambda: nf4.QLoRALinear(4, 4, r=0), ValueError, "r: expected an int of at least 1"),
    "r_negative": (lambda: nf4.QLoRALinear(4, 4, r=-3), ValueError, "got -3"),
    "r_float": (lambda: nf4.QLoRALinear(4, 4, r=2.0), TypeError, "r: expected an int, got float"),
    "alpha": (lambda: nf4.QLoRALinear(4, 4, lora_alpha=0), ValueError, "lora_alpha: expected"),
    "alpha_text": (lambda: nf4.QLoRALinear(4, 4, lora_alpha="8"), TypeError, "got str"),
    "dropout": (
        lambda: nf4.QLoRALinear(4, 4, lora_dropout=1),
        ValueError,
        r"lora_dropout: expected a number in \[0, 1\), got 1",
    ),
    "kind": (
        lambda: nf4.LinearNF4.from_linear(nn.Conv2d(3, 3, 1)),
        TypeError,
        "expected torch.nn.Linear or transformers' Conv1D, got Conv2d",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_layer_rejects(case) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
