"""Every wrong argument of the public functions gets an error that names it."""

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import nf4
from nf4.ops import registry
from nf4.tools import streams

W = torch.randn(8, 64)
Q = nf4.quantize(W)
X = torch.randn(3, 64)
A, B = torch.randn(2, 64), torch.randn(8, 2)

BAD_CALLS = {
    "w_list": (lambda: nf4.quantize([1.0]), TypeError, "w: expected a torch.Tensor, got list"),
    "w_int": (
        lambda: nf4.quantize(torch.zeros(4, dtype=torch.int32)),
        TypeError,
        "w: expected dtype float32, float16 or bfloat16, got torch.int32",
    ),
    "w_float64": (lambda: nf4.quantize(W.double()), TypeError, "got torch.float64"),
    "w_sparse": (lambda: nf4.quantize(W.to_sparse()), TypeError, "dense tensor, got layout"),
    "block_size_48": (
        lambda: nf4.quantize(W, 48),
        ValueError,
        "block_size: expected a power of two from 32 to 4096, got 48",
    ),
    "block_size_16": (lambda: nf4.quantize(W, 16), ValueError, "got 16"),
    "block_size_8192": (lambda: nf4.quantize(W, 8192), ValueError, "got 8192"),
    "block_size_float": (lambda: nf4.quantize(W, 64.0), TypeError, "expected an int, got float"),
    "block_size_bool": (lambda: nf4.quantize(W, True), TypeError, "expected an int, got bool"),
    "dequantize_tensor": (lambda: nf4.dequantize(W), TypeError, "q: expected an NF4Tensor"),
    "dequantize_int8": (
        lambda: nf4.dequantize(Q, torch.int8),
        TypeError,
        "dtype: expected a floating torch.dtype, got torch.int8",
    ),
    "dequantize_text": (lambda: nf4.dequantize(Q, "half"), TypeError, "dtype: expected"),
    "check_int": (lambda: nf4.quantize(W, check=1), TypeError, "check: expected a bool, got int"),
    "quantize_out_shape": (
        lambda: nf4.quantize(W[:4], out=Q),
        ValueError,
        r"out: expected an NF4Tensor that fits w, got shape: expected \(4, 64\), got \(8, 64\)",
    ),
    "quantize_out_block_size": (
        lambda: nf4.quantize(W, 32, out=Q),
        ValueError,
        "block_size: expected 32, got 64",
    ),
    "quantize_out_tensor": (
        lambda: nf4.quantize(W, out=W),
        TypeError,
        "out: expected an NF4Tensor, got Tensor",
    ),
    "dequantize_out_shape": (
        lambda: nf4.dequantize(Q, out=torch.empty(8, 63)),
        ValueError,
        r"out: expected shape \(8, 64\) like q, got \(8, 63\)",
    ),
    "dequantize_out_dtype": (
        lambda: nf4.dequantize(Q, torch.half, out=torch.empty(8, 64)),
        TypeError,
        "dtype: expected torch.float32 like out, got torch.float16",
    ),
    "dequantize_out_int": (
        lambda: nf4.dequantize(Q, out=torch.empty(8, 64, dtype=torch.int32)),
        TypeError,
        "out: expected a floating dtype, got torch.int32",
    ),
    "dequantize_out_device": (
        lambda: nf4.dequantize(Q, out=torch.empty(8, 64, device="meta")),
        ValueError,
        "out: expected device cpu, where the weight is, got meta",
    ),
    "dequantize_out_grad": (
        lambda: nf4.dequantize(Q, out=torch.empty(8, 64, requires_grad=True)),
        ValueError,
        "out: expected a tensor that needs no gradient",
    ),
    "linear_q": (lambda: nf4.linear(X, W), TypeError, "q: expected an NF4Tensor, got Tensor"),
    "linear_q_1d": (
        lambda: nf4.linear(X, nf4.quantize(W.flatten())),
        ValueError,
        r"q: expected a quantized matrix \[N, K\], got shape \(512,\)",
    ),
    "linear_x_int": (lambda: nf4.linear(X.int(), Q), TypeError, "x: expected a floating dtype"),
    "linear_x_shape": (
        lambda: nf4.linear(X[:, :63], Q),
        ValueError,
        r"x: expected shape \(..., 64\) for a weight \(8, 64\), got \(3, 63\)",
    ),
    "linear_x_0d": (lambda: nf4.linear(torch.ones(()), Q), ValueError, "x: expected shape"),
    "linear_x_device": (
        lambda: nf4.linear(X.to("meta"), Q),
        ValueError,
        "x: expected device cpu, where the weight is, got meta",
    ),
    "linear_x_none": (lambda: nf4.linear(None, Q), TypeError, "x: expected a torch.Tensor"),
    "linear_bias_shape": (
        lambda: nf4.linear(X, Q, torch.zeros(7)),
        ValueError,
        r"bias: expected shape \(8,\), got \(7,\)",
    ),
    "linear_bias_int": (
        lambda: nf4.linear(X, Q, torch.zeros(8, dtype=torch.int64)),
        TypeError,
        "bias: expected a floating dtype",
    ),
    "lora_A_shape": (
        lambda: nf4.lora_linear(X, Q, A[:, :5], B),
        ValueError,
        r"lora_A: expected shape \(r, 64\) with r ≥ 1, got \(2, 5\)",
    ),
    "lora_A_rank_0": (lambda: nf4.lora_linear(X, Q, A[:0], B[:, :0]), ValueError, "r ≥ 1"),
    "lora_B_shape": (
        lambda: nf4.lora_linear(X, Q, A, B.T),
        ValueError,
        r"lora_B: expected shape \(8, 2\), got \(2, 8\)",
    ),
    "lora_scaling": (
        lambda: nf4.lora_linear(X, Q, A, B, "2"),
        TypeError,
        "scaling: expected a number, got str",
    ),
    "lora_dropout_1": (
        lambda: nf4.lora_linear(X, Q, A, B, dropout_p=1.0),
        ValueError,
        r"dropout_p: expected a number in \[0, 1\), got 1.0",
    ),
    "lora_dropout_negative": (
        lambda: nf4.lora_linear(X, Q, A, B, dropout_p=-0.1),
        ValueError,
        "got -0.1",
    ),
    "lora_dropout_nan": (
        lambda: nf4.lora_linear(X, Q, A, B, dropout_p=float("nan")),
        ValueError,
        "got nan",
    ),
    "lora_dropout_text": (
        lambda: nf4.lora_linear(X, Q, A, B, dropout_p="0.1"),
        TypeError,
        "dropout_p: expected a number",
    ),
    "lora_seed": (
        lambda: nf4.lora_linear(X, Q, A, B, dropout_p=0.1, seed=3),
        TypeError,
        r"seed: expected an int64 tensor, got 3",
    ),
    "lora_seed_device": (
        lambda: nf4.lora_linear(
            X, Q, A, B, dropout_p=0.1, seed=torch.zeros((), dtype=torch.int64, device="meta")
        ),
        ValueError,
        r"seed: expected shape \(\) on cpu, where the weight is, got \(\) on meta",
    ),
    "lora_scaling_nan": (
        lambda: nf4.lora_linear(X, Q, A, B, float("nan")),
        ValueError,
        "scaling: expected a finite number that float32 can hold, got nan",
    ),
    "lora_scaling_1e39": (lambda: nf4.lora_linear(X, Q, A, B, 1e39), ValueError, "got 1e.39"),
    "lora_scaling_of_400_digits": (
        lambda: nf4.lora_linear(X, Q, A, B, 10**400),
        ValueError,
        "scaling: expected a finite number that float32 can hold, got an int of 1329 bits",
    ),
    "lora_scaling_vector": (
        lambda: nf4.lora_linear(X, Q, A, B, torch.ones(2)),
        ValueError,
        r"scaling: expected a number, got a tensor \(2,\) of torch.float32",
    ),
    "lora_scaling_device": (
        lambda: nf4.lora_linear(X, Q, A, B, torch.ones((), device="meta")),
        ValueError,
        "scaling: expected device cpu or the CPU, got meta",
    ),
    "lora_alpha_1e39": (
        lambda: nf4.QLoRALinear(64, 8, lora_alpha=1e39),
        ValueError,
        "lora_alpha: expected a finite number that float32 can hold",
    ),
    "nf4_wants_a_gradient": (
        lambda: nf4.linear(X, dataclasses.replace(Q, offset=Q.offset.clone().requires_grad_())),
        ValueError,
        "q.offset: expected a tensor that needs no gradient, for none flows to a 4-bit weight",
    ),
    "w_nested": (
        lambda: nf4.quantize(torch.nested.nested_tensor([W, X], layout=torch.jagged)),
        TypeError,
        "w: expected a dense tensor, got a nested tensor",
    ),
    "quantize_out_negated": (
        lambda: nf4.quantize(W, out=dataclasses.replace(Q, offset=torch._neg_view(Q.offset))),
        ValueError,
        "out: expected parts of their own, got views that are to be negated",
    ),
    "linear_x_float8": (
        lambda: nf4.linear(X.to(torch.float8_e4m3fn), Q),
        TypeError,
        "x: expected float32, float16, bfloat16 or float64, got torch.float8_e4m3fn",
    ),
    "double_quant_text": (
        lambda: nf4.quantize(W, double_quant="no"),
        TypeError,
        "double_quant: expected a bool, got str",
    ),
    "nf4_block_size": (
        lambda: nf4.dequantize(dataclasses.replace(Q, block_size=48)),
        ValueError,
        "q.block_size: expected one of .*, got 48",
    ),
    "nf4_to_dtype": (lambda: Q.to(torch.bfloat16), TypeError, "device"),
    "error_device": (
        lambda: nf4.quantization_error(W.to("meta"), Q),
        ValueError,
        "w: expected device cpu like q, got meta",
    ),
    "error_nan": (
        lambda: nf4.quantization_error(W * float("nan"), Q),
        ValueError,
        "w: expected finite values",
    ),
    "error_shape": (
        lambda: nf4.quantization_error(W.T, Q),
        ValueError,
        r"w: expected shape \(8, 64\) like q, got \(64, 8\)",
    ),
    "nf4_half_double": (
        lambda: nf4.dequantize(dataclasses.replace(Q, offset=None)),
        ValueError,
        "absmax2 and offset belong together",
    ),
    "nf4_packed_dtype": (
        lambda: nf4.dequantize(dataclasses.replace(Q, packed=Q.packed.float())),
        TypeError,
        "q.packed: expected torch.uint8, got torch.float32",
    ),
    "nf4_absmax_count": (
        lambda: nf4.dequantize(dataclasses.replace(Q, absmax=Q.absmax[:-1])),
        ValueError,
        r"q.absmax: expected shape \(8,\) for \(8, 64\) at block size 64, got \(7,\)",
    ),
    "nf4_scale_device": (
        lambda: nf4.dequantize(dataclasses.replace(Q, offset=Q.offset.to("meta"))),
        ValueError,
        "q.offset: expected device cpu like packed, got meta",
    ),
    "torch_function": (
        lambda: torch.nn.functional.linear(X, Q),
        TypeError,
        "linear: expected a torch.Tensor, got an NF4Tensor; multiply by it with nf4.linear",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_wrong_argument_is_named(case) -> None:
    call, kind, message = BAD_CALLS[case]
    with pytest.raises(kind, match=message):
        call()


def test_a_weight_whose_parts_change_is_checked_again() -> None:
    q = nf4.quantize(W, double_quant=False)
    nf4.linear(X, q)
    q.absmax.data = q.absmax.data.view(torch.int32)
    with pytest.raises(TypeError, match="q.absmax: expected torch.float32, got torch.int32"):
        nf4.linear(X, q)
    q = nf4.quantize(W, double_quant=False)
    q.absmax.requires_grad_()
    with torch.no_grad():
        nf4.linear(X, q)  # nothing is lost here
    with pytest.raises(ValueError, match="q.absmax: expected a tensor that needs no gradient"):
        nf4.linear(X, q)


def negated(t: torch.Tensor) -> torch.Tensor:
    """Return -t as a view, whose bytes are those of t."""
    return torch._neg_view(t)


@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_a_negated_view_is_quantized_as_what_it_stands_for(scale) -> None:
    found, expected = (nf4.quantize(w, scale=scale) for w in (negated(W), -W))
    assert all(map(torch.equal, found.tensors(), expected.tensors()))
    out = negated(torch.zeros(8, 64))
    assert torch.equal(nf4.dequantize(Q, out=out), nf4.dequantize(Q)) and out.is_neg()


def test_negated_views_are_multiplied_as_what_they_stand_for() -> None:
    results = []
    for minus in (negated, torch.neg):
        x, a, b = (t.clone().requires_grad_() for t in (X, A, B))
        bias = torch.arange(8.0)
        y = nf4.lora_linear(minus(x), Q, minus(a), minus(b), 2.0, minus(bias))
        y = y + nf4.linear(minus(x), Q, minus(bias))
        y.backward(minus(torch.ones_like(y)))
        results.append((y, x.grad, a.grad, b.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaling_may_be_a_tensor_whose_value_is_never_asked_for(dtype, monkeypatch) -> None:
    def gradients(scaling):
        x, a, b = (t.to(dtype, copy=True).requires_grad_() for t in (X, A, B))
        y = nf4.lora_linear(x, Q, a, b, scaling)
        y.sum().backward()
        return y, x.grad, a.grad, b.grad

    expected = gradients(0.25)
    with monkeypatch.context() as patch:
        for method in ("item", "__float__", "__bool__", "tolist"):
            patch.setattr(torch.Tensor, method, lambda *_: pytest.fail("waits for a value"))
        found = gradients(torch.tensor(0.25))
    assert all(map(torch.equal, found, expected))  # a power of two is exact


@pytest.mark.parametrize("slab", [64, 128, 8192])
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_a_strided_weight_is_quantized_without_a_whole_copy(scale, slab, monkeypatch) -> None:
    from nf4.ops import quantize as operators

    run, sizes = operators.run, []
    monkeypatch.setattr(operators, "_SLAB", slab)
    monkeypatch.setattr(
        operators, "run", lambda op, w, *args: (sizes.append((op, w)), run(op, w, *args))[1]
    )
    w, experts = torch.randn(130, 258), torch.randn(3, 96, 130)
    views = {
        "transposed": w.t(),
        "columns": w[:, 3:200],
        "one row": w.t()[None],
        "experts": experts.transpose(1, 2),
        "a column": torch.randn(9000, 2)[:, 0],
        "expanded": w.expand(3, 130, 258)[..., ::2],
    }
    for view in views.values():
        columns = torch.rand(view.shape[-1]) if scale == "mse" else None
        expected = nf4.quantize(view.contiguous(), scale=scale, weights=columns)
        sizes.clear()
        found = nf4.quantize(view, scale=scale, weights=columns)
        assert all(map(torch.equal, found.tensors(), expected.tensors()))
        pieces = [w.numel() for op, w in sizes if op != "quantize_absmax"]
        assert max(pieces) <= slab and sum(pieces) == view.numel()
        out = nf4.quantize(torch.ones_like(view))
        nf4.quantize(view, out=out, check=False)
        assert all(map(torch.equal, out.tensors(), nf4.quantize(view).tensors()))


def test_nf4tensor_tells_its_size() -> None:
    q = nf4.quantize(torch.randn(4096, 1024))
    assert q.bits_per_weight == pytest.approx(4.127, abs=5e-4)
    assert q.nbytes == 4096 * 512 + 65536 + 4 * 256 + 4
    single = nf4.quantize(torch.randn(64, 64), double_quant=False)
    assert single.bits_per_weight == 4.5
    assert (q.ndim, q.numel(), q.absmax_block_size, q.double_quant) == (2, 4096 * 1024, 256, True)
    assert "4.127 bits per weight" in repr(q) and "tensor(" not in repr(q)


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4tensor_moves_between_devices(double_quant) -> None:
    q = nf4.quantize(torch.randn(8, 64), double_quant=double_quant)
    assert {t.device.type for t in q.to("meta").tensors()} == {"meta"}
    assert torch.equal(nf4.dequantize(q.to("cpu")), nf4.dequantize(q))


def test_operators_run_on_the_device_of_their_tensors(monkeypatch) -> None:
    """Kernels are launched on the current device: it must be that of the tensors."""
    entered, computed = [], []

    @contextmanager
    def enter(device):
        entered.append(device)
        yield
        entered.append(None)

    module = SimpleNamespace(device=enter)
    monkeypatch.setattr(streams, "current_gpu", lambda: 0)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(
        registry, "implementation", lambda *key: lambda x: computed.append((key, list(entered)))
    )
    first, second = (SimpleNamespace(device=torch.device("cuda", i)) for i in (0, 1))
    registry.run("dequantize", first, first)
    registry.run("dequantize", second, second)
    key = ("dequantize", "cuda")
    assert computed == [(key, []), (key, [second.device])]
    assert entered == [second.device, None]


def test_results_of_any_shape_may_be_written_to_in_place() -> None:
    """They are no views to autograd, which would refuse it."""
    q = nf4.quantize(torch.randn(48, 64))
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    for x in (torch.randn(2, 3, 64), torch.randn(64), torch.randn(0, 3, 64)):
        x.requires_grad_()
        for y in (nf4.linear(x, q), nf4.lora_linear(x, q, a, b)):
            assert y.shape == (*x.shape[:-1], 48)
            y.mul_(2).sum().backward()
        assert x.grad.shape == x.shape
