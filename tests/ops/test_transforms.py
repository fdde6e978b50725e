"""torch.func on 4-bit layers: gradients by transforms are those of the dense computation."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vjp, vmap

import nf4

N, K, R = 32, 64, 4


@pytest.fixture
def q():
    return nf4.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def terms(q):
    """x, A, B and the weight: in double, sums in any order agree to the last digits."""
    of = torch.Generator().manual_seed(1)
    x, a, b = (torch.randn(*s, generator=of, dtype=torch.float64) for s in ((5, K), (R, K), (N, R)))
    return x, a, b, nf4.dequantize(q).double()


def same(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_linear(q, terms) -> None:
    x, _, _, w = terms
    ours, dense = (lambda x: nf4.linear(x, q)), (lambda x: x @ w.T)
    loss, dense_loss = (lambda x: ours(x).square().sum()), (lambda x: dense(x).square().sum())
    same(grad(loss)(x), grad(dense_loss)(x))
    same(jacrev(ours)(x), jacrev(dense)(x))
    same(vmap(ours)(x), dense(x))
    same(vmap(grad(loss))(x), grad(dense_loss)(x))
    same(vmap(ours, in_dims=1)(x[None]), dense(x)[:, None])
    same(vjp(ours, x)[1](torch.ones(5, N).double())[0], torch.ones(5, N).double() @ w)


def test_lora_linear(q, terms) -> None:
    x, a, b, w = terms

    def ours(x, a, b):
        return nf4.lora_linear(x, q, a, b, 0.5).square().sum()

    def dense(x, a, b):
        return (x @ w.T + 0.5 * (x @ a.T) @ b.T).square().sum()

    every = (0, 1, 2)
    same(grad(ours, every)(x, a, b), grad(dense, every)(x, a, b))
    dims = (0, None, None)
    found = vmap(grad(ours, every), dims)(x, a, b)
    same(found, vmap(grad(dense, every), dims)(x, a, b))
    assert found[1].shape == (5, R, K)
    assert vmap(lambda x: nf4.lora_linear(x, q, a, b))(x[:0]).shape == (0, N)
    none = vmap(grad(ours, every), dims)(x[:0], a, b)
    assert [gradient.shape for gradient in none] == [(0, K), (0, R, K), (0, N, R)]


@pytest.mark.parametrize("kind", ["lora", "ia3", "dora"])
def test_gradients_by_sample_are_those_of_single_samples(kind) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, K))
    model = nf4.quantize_model(model)
    if kind == "ia3":
        nf4.add_ia3(model, target_modules=["0", "2"], feedforward_modules=["2"])
    else:
        nf4.add_lora(model, r=R, use_dora=kind == "dora")
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in parameters.values():
            p.add_(torch.randn_like(p) / 10)
    x = torch.randn(3, K)

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    detached = {n: p.detach() for n, p in parameters.items()}
    found = vmap(grad(loss), (None, 0))(detached, x)
    for i in range(3):
        model.zero_grad()
        model(x[i]).square().sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_not_there_is_refused_in_our_words(q) -> None:
    def loss(x):
        return nf4.linear(x, q).square().sum()

    with pytest.raises(NotImplementedError, match="nf4: the gradient of a gradient"):
        grad(lambda x: grad(loss)(x).sum())(torch.randn(K))
    with pytest.raises(NotImplementedError, match="nf4: .* is not implemented"):
        hessian(loss)(torch.randn(K))


def test_factors_by_vjp_and_a_derivative_of_a_derivative(q) -> None:
    """Autograd over torch.func goes through the weight once, and leaves no term out."""
    x, factor = torch.randn(3, K), torch.randn(N)
    w = nf4.dequantize(q)

    def ours(x, factor):
        return nf4.linear(x, q, output_factor=factor)

    found = vjp(ours, x, factor)[1](torch.ones(3, N))
    expected = vjp(lambda x, factor: x @ w.T * factor, x, factor)[1](torch.ones(3, N))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    factor.requires_grad_()
    found = grad(lambda x, f: ours(x, f).square().sum(), argnums=1)(x, factor)
    expected = grad(lambda x, f: (x @ w.T * f).square().sum(), argnums=1)(x, factor)
    for mine, dense in zip(
        torch.autograd.grad(found.sum(), (x, factor)),
        torch.autograd.grad(expected.sum(), (x, factor)),
        strict=True,
    ):
        torch.testing.assert_close(mine, dense, rtol=1e-4, atol=1e-3)
