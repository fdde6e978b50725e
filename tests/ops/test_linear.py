"""nf4.linear, the operator: values, gradients, what is kept, compilation."""

import pytest
import torch

import nf4
from nf4.error import exact

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 96), (2, 3, 96), (96,), (0, 96), (1, 96)], ids=str)
def test_linear_is_right(shape, dtype) -> None:
    q = nf4.quantize(torch.randn(80, 96).to(dtype))
    x, bias = torch.randn(shape).to(dtype), torch.randn(80).to(dtype)
    y = nf4.linear(x, q, bias)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 80)
    assert exact.linear(x.view(-1, 96), q, bias).share(y.view(-1, 80)) <= 1


@pytest.mark.parametrize("shape", [(80, 96), (7, 33), (96, 1), (1, 64)], ids=str)
@pytest.mark.parametrize("block_size", [32, 4096])
def test_linear_takes_any_weight_shape(shape, block_size) -> None:
    q = nf4.quantize(torch.randn(shape), block_size)
    x = torch.randn(5, shape[1])
    torch.testing.assert_close(nf4.linear(x, q), x @ nf4.dequantize(q).T)


def test_linear_gradcheck_in_float64() -> None:
    q = nf4.quantize(torch.randn(12, 34))
    x = torch.randn(2, 3, 34, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: nf4.linear(x, q, b), (x, bias))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=str)
def test_linear_gives_gradients_only_where_asked(needs) -> None:
    q = nf4.quantize(torch.randn(12, 34))
    x, bias = torch.randn(5, 34, requires_grad=needs[0]), torch.randn(12, requires_grad=needs[1])
    nf4.linear(x, q, bias).square().sum().backward()
    assert (x.grad is not None, bias.grad is not None) == needs
    assert all(t.grad is None for t in q.tensors())


def test_linear_keeps_only_the_quantized_weight() -> None:
    q = nf4.quantize(torch.randn(256, 256))
    x = torch.randn(4, 256, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nf4.linear(x, q)
    assert sum(t.nbytes for t in saved) == q.nbytes


def test_linear_refuses_a_second_derivative() -> None:
    q = nf4.quantize(torch.randn(12, 34))
    x = torch.randn(5, 34, requires_grad=True)
    y = nf4.linear(x, q).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient of a gradient"):
        grad.sum().backward()


def test_linear_refuses_forward_mode() -> None:
    q = nf4.quantize(torch.randn(12, 34))
    x, v = torch.randn(5, 34), torch.randn(5, 34)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: nf4.linear(x, q), (x,), (v,))


@pytest.mark.parametrize("needs_bias", [False, True])
def test_linear_autocast_equals_casting_by_hand(needs_bias) -> None:
    q = nf4.quantize(torch.randn(12, 64))
    x = torch.randn(5, 64, requires_grad=True)
    by_hand = x.detach().bfloat16().requires_grad_()
    bias = torch.randn(12) if needs_bias else None
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4.linear(x, q, bias)
    expected = nf4.linear(by_hand, q, bias)
    y.sum().backward()
    expected.sum().backward()
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert x.grad.dtype == torch.float32 and torch.equal(x.grad, by_hand.grad.float())


def test_linear_autocast_leaves_float64_alone() -> None:
    q = nf4.quantize(torch.randn(12, 64))
    x = torch.randn(5, 64, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert nf4.linear(x, q).dtype == torch.float64


@pytest.mark.parametrize("double_quant", [False, True])
def test_linear_and_dequantize_pass_opcheck(double_quant) -> None:
    w = torch.randn(12, 64)
    q = nf4.quantize(w, 32, double_quant)
    parts = (q.packed, q.absmax, q.absmax2, q.offset)
    x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(12, requires_grad=True)
    torch.use_deterministic_algorithms(False)
    opcheck, ops = torch.library.opcheck, torch.ops.nf4
    opcheck(ops.quantize.default, (w, 32, True))
    opcheck(ops.quantize_absmax.default, (torch.rand(300),))
    opcheck(ops.dequantize.default, (*parts, [12, 64], 32, torch.bfloat16))
    packed, absmax = torch.ops.nf4.quantize(w, 32, False)
    opcheck(ops.quantize_out.default, (w, 32, False, packed, absmax))
    codes, absmax2, offset = torch.ops.nf4.quantize_absmax(absmax)
    opcheck(ops.quantize_absmax_out.default, (absmax, codes, absmax2, offset))
    opcheck(ops.dequantize_out.default, (*parts, 32, torch.empty(12, 64)))
    opcheck(ops.linear.default, (x, *parts, bias, 12, 32))
    opcheck(ops.linear_backward.default, (torch.randn(5, 12), *parts, 64, 32))


def test_linear_compiles_without_graph_breaks_and_with_changing_batches(backend) -> None:
    q = nf4.quantize(torch.randn(12, 64))
    compiled = torch.compile(
        lambda x, b: nf4.linear(x, q, b).relu(), fullgraph=True, dynamic=True, backend=backend
    )
    bias = torch.randn(12, requires_grad=True)
    for rows in (3, 8, 17):
        x = torch.randn(rows, 64, requires_grad=True)
        y = compiled(x, bias)
        (grad,) = torch.autograd.grad(y.sum(), x)
        expected = nf4.linear(x, q, bias).relu()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_quantize_and_dequantize_compile_without_graph_breaks(backend) -> None:
    @torch.compile(fullgraph=True, backend=backend)
    def round_trip(w: torch.Tensor) -> torch.Tensor:
        return nf4.dequantize(nf4.quantize(w, 128)) * 2

    @torch.compile(fullgraph=True, backend=backend)
    def into(w: torch.Tensor, q: nf4.NF4Tensor, out: torch.Tensor) -> torch.Tensor:
        return nf4.dequantize(nf4.quantize(w, 128, out=q), out=out) + 1

    w = torch.randn(33, 65)
    expected = nf4.dequantize(nf4.quantize(w, 128))
    assert torch.equal(round_trip(w), expected * 2)
    q, out = nf4.quantize(torch.randn(33, 65), 128), torch.empty(33, 65)
    assert torch.equal(into(w, q, out), expected + 1)
    assert torch.equal(out, expected) and torch.equal(nf4.dequantize(q), expected)


def test_linear_on_meta_gives_the_shape() -> None:
    q = nf4.quantize(torch.empty(12, 64, device="meta"))
    assert nf4.linear(torch.empty(3, 5, 64, device="meta"), q).shape == (3, 5, 12)
    assert nf4.dequantize(q, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
def test_linear_lets_its_result_be_written_to_in_place(shape, rows) -> None:
    q = nf4.quantize(torch.randn(64, 128))
    x = torch.randn(*shape, rows, 128, requires_grad=True)
    expected = torch.relu(nf4.linear(x, q) + 1)
    y = nf4.linear(x, q)
    y += 1
    assert torch.equal(torch.relu_(y), expected)
    y.sum().backward()
    assert x.grad is not None and x.grad.any()


def test_linear_without_outputs_has_a_gradient_for_its_bias() -> None:
    q = nf4.quantize(torch.empty(0, 64))
    bias = torch.empty(0, requires_grad=True)
    nf4.linear(torch.randn(3, 64), q, bias).sum().backward()
    assert bias.grad is not None and bias.grad.shape == (0,)


def test_linear_checks_again_what_was_given_other_memory() -> None:
    q, x = nf4.quantize(torch.randn(64, 128), double_quant=False), torch.randn(1, 128)
    nf4.linear(x, q)
    q.absmax.resize_(2)
    with pytest.raises(ValueError, match="absmax: expected shape"):
        nf4.linear(x, q)


def test_linear_under_another_default_device_and_of_lazily_negated_rows() -> None:
    q, x = nf4.quantize(torch.randn(64, 128)), torch.randn(1, 128)
    expected = nf4.linear(x, q)
    with torch.device("meta"):
        assert torch.equal(nf4.linear(x, q), expected)
        assert torch.equal(
            nf4.quantize(torch.ones(64, device="cpu")).packed,
            nf4.quantize(torch.ones(64, device="cpu")).packed,
        )
    assert torch.equal(nf4.linear(torch._neg_view(x), q), -expected)


FACTORS = {"input": (True, False), "output": (False, True), "both": (True, True)}


def factors(n: int, k: int, which: tuple[bool, bool]) -> dict[str, torch.Tensor]:
    made = {"input_factor": torch.randn(k), "output_factor": torch.randn(n)}
    return {name: f for (name, f), wanted in zip(made.items(), which, strict=True) if wanted}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", FACTORS.values(), ids=FACTORS.keys())
@pytest.mark.parametrize("rows", [1, 40])
def test_linear_with_factors_is_what_autograd_makes_of_it(rows, which, dtype) -> None:
    n, k = 48, 128
    q = nf4.quantize(torch.randn(n, k).to(torch.float32 if dtype == torch.float64 else dtype))
    wide = torch.float64
    x, bias = torch.randn(2, rows, k, dtype=dtype), torch.randn(n, dtype=dtype)
    given = {"x": x, "bias": bias, **factors(n, k, which)}
    found = {name: t.clone().requires_grad_() for name, t in given.items()}
    exact = {name: t.to(wide).requires_grad_() for name, t in given.items()}
    y = nf4.linear(found["x"], q, **{name: t for name, t in found.items() if name != "x"})
    scaled = exact["x"] * exact.get("input_factor", torch.ones(k))
    expected = scaled @ nf4.dequantize(q, dtype).to(wide).T + exact["bias"]
    expected = expected * exact.get("output_factor", torch.ones(n))
    # bf16 rounds x, the product, the factored product and each gradient: a few halves of 2**-8
    bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    assert y.dtype == dtype and relative_error(y, expected) < bound
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.to(wide))
    for name, tensor in found.items():
        assert tensor.grad.dtype == tensor.dtype
        found_error = relative_error(tensor.grad, exact[name].grad)
        assert found_error < max(bound, torch.finfo(tensor.dtype).eps), name


@pytest.mark.parametrize("which", FACTORS.values(), ids=FACTORS.keys())
def test_linear_with_factors_in_evaluation_and_compiled(which, backend) -> None:
    q, given = nf4.quantize(torch.randn(48, 128)), factors(48, 128, which)
    x = torch.randn(5, 128, requires_grad=True)
    y = nf4.linear(x, q, **given)
    with torch.no_grad():
        assert relative_error(nf4.linear(x, q, **given), y.double()) < 1e-6
    given = {name: f.requires_grad_() for name, f in given.items()}
    compiled = torch.compile(nf4.linear, fullgraph=True, backend=backend)
    z = compiled(x, q, **given)
    assert relative_error(z, y.double()) < 1e-6
    expected = torch.autograd.grad(nf4.linear(x, q, **given).square().sum(), given.values())
    for grad, wanted in zip(
        torch.autograd.grad(z.square().sum(), given.values()), expected, strict=True
    ):
        assert relative_error(grad, wanted.double()) < 1e-5


def test_linear_refuses_factors_that_do_not_fit() -> None:
    q, x = nf4.quantize(torch.randn(48, 128)), torch.randn(5, 128)
    with pytest.raises(ValueError, match=r"input_factor: expected shape \(128,\), got \(48,\)"):
        nf4.linear(x, q, input_factor=torch.ones(48))
    with pytest.raises(ValueError, match=r"output_factor: expected shape \(48,\), got \(128,\)"):
        nf4.linear(x, q, output_factor=torch.ones(128))
    with pytest.raises(TypeError, match="output_factor: expected"):
        nf4.linear(x, q, output_factor=2.0)


def test_second_gradients_of_factors_are_refused() -> None:
    q, x = nf4.quantize(torch.randn(48, 128)), torch.randn(5, 128, requires_grad=True)
    factor = torch.ones(48, requires_grad=True)
    loss = nf4.linear(x, q, output_factor=factor).square().sum()
    with pytest.raises(NotImplementedError, match="gradient of a gradient is not implemented"):
        torch.autograd.grad(loss, factor, create_graph=True)
