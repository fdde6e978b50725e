"""nf4.explain on a CPU, and layers that hold their weight in fragments."""

import copy
import io

import pytest
import torch

import nf4
from nf4.ops import registry

Q = nf4.quantize(torch.randn(32, 128))


def test_explain_names_what_runs_on_a_cpu() -> None:
    told = nf4.explain((2, 3, 128), Q)
    assert told.kernel == "nf4.cpu.linear.linear" and told.modelled_seconds is None
    assert str(told) == f"{told.kernel}: {told.reason}"
    assert told.reason.endswith("few rows are multiplied without writing W")
    many = nf4.explain((64, 128), Q)
    assert many.reason.endswith("slabs of W are dequantized and multiplied")
    with registry.computing("cpu", "reference"):
        told = nf4.explain((2, 3, 128), Q)
        assert told.kernel == "nf4.reference.linear.linear"
        assert told.reason == "numba is not installed: the reference, in plain PyTorch"


def test_explain_tells_of_adapters_and_of_gradients() -> None:
    told = nf4.explain((2, 128), Q, r=4)
    assert (told.how, told.kernel) == ("few rows", "nf4.cpu.lora_linear.lora_linear")
    told = nf4.explain((2, 128), Q, torch.float32, r=4, dropout_p=0.1, backward=True)
    assert (told.how, told.kernel) == ("slabs", "nf4.cpu.lora_linear.lora_linear_backward")
    told = nf4.explain((2, 128), Q, torch.float32, backward=True)
    assert (told.how, told.kernel) == ("slabs", "nf4.cpu.linear.linear_backward")


BAD = {
    "shape": (lambda: nf4.explain((3, 64), Q), ValueError, r"shape: expected \(..., 128\)"),
    "no_shape": (lambda: nf4.explain((), Q), ValueError, "shape: expected"),
    "tensor": (lambda: nf4.explain((3, 128), torch.ones(3)), TypeError, "q: expected an NF4Tensor"),
    "vector": (
        lambda: nf4.explain((128,), nf4.quantize(torch.ones(128))),
        ValueError,
        "a quantized",
    ),
    "rank": (
        lambda: nf4.explain((3, 128), Q, r=-1),
        ValueError,
        "r: expected an int of at least 0",
    ),
    "dropout": (
        lambda: nf4.explain((3, 128), Q, r=4, dropout_p=1),
        ValueError,
        r"dropout_p: expected a number in \[0, 1\), got 1",
    ),
    "dtype": (lambda: nf4.explain((3, 128), Q, "half"), TypeError, "dtype: expected a torch.dtype"),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_explain_refuses(call, kind, message) -> None:
    with pytest.raises(kind, match=message):
        call()


def layers(**options) -> tuple[nf4.LinearNF4, nf4.LinearNF4]:
    """Return a layer in rows and the same one in fragments."""
    rows = nf4.QLoRALinear.from_linear(torch.nn.Linear(128, 32), r=4, **options)
    torch.nn.init.normal_(rows.lora_B)
    return rows, copy.deepcopy(rows).to_fragments()


def test_layer_in_fragments_computes_the_same() -> None:
    rows, fragments = layers()
    x = torch.randn(3, 128)
    assert fragments.layout == "fragments" and not torch.equal(rows.packed, fragments.packed)
    assert torch.equal(rows(x), fragments(x))
    assert torch.equal(rows.merged_weight(), fragments.merged_weight())
    assert fragments.to_rows() is fragments and fragments.layout == "rows"
    assert torch.equal(rows.packed, fragments.packed) and torch.equal(rows.absmax, fragments.absmax)


@pytest.mark.parametrize("double_quant", [False, True])
def test_layer_in_fragments_saves_and_loads_rows(double_quant) -> None:
    rows, fragments = layers(double_quant=double_quant)
    state = fragments.state_dict()
    for name, value in rows.state_dict().items():
        assert torch.equal(state[name], value), name
    other_rows, other = layers(double_quant=double_quant)
    for layer in (other_rows, other):
        layer.load_state_dict(state)
        assert torch.equal(layer(torch.ones(1, 128)), rows(torch.ones(1, 128)))
    assert other.layout == "fragments" and torch.equal(other.packed, fragments.packed)
    other.load_state_dict({"packed": state["packed"] + 1}, strict=False)
    assert torch.equal(nf4.to_rows(other.weight).packed, state["packed"] + 1)
    assert torch.equal(other.absmax, fragments.absmax)


def test_layer_in_fragments_is_copied_pickled_and_cast() -> None:
    rows, fragments = layers()
    x = torch.randn(3, 128)
    buffer = io.BytesIO()
    torch.save(fragments, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fragments), torch.load(buffer, weights_only=False)):
        assert other.layout == "fragments" and torch.equal(other(x), rows(x))
    assert fragments.half().dtype == torch.float16
    # Moved to a CPU it goes back to rows, where CPU kernels read it as it is.
    assert fragments.to("cpu").layout == "rows"
    assert torch.equal(fragments.packed, rows.packed)


def test_layer_in_fragments_runs_on_the_tensors_of_its_state_dict() -> None:
    rows, fragments = layers()
    x = torch.randn(3, 128)
    y = torch.func.functional_call(fragments, fragments.state_dict(), (x,))
    assert torch.equal(y, rows(x))


def test_layout_may_change_between_forward_and_backward() -> None:
    gradients = []
    for layer in layers():
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        layer.to_rows() if layer.layout == "fragments" else layer.to_fragments()
        y.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_layer_that_does_not_fit_fragments_says_so() -> None:
    layer = nf4.LinearNF4(96, 40)
    with pytest.raises(ValueError, match="expected a matrix .* for fragments"):
        layer.to_fragments()
    assert layer.layout == "rows"
