"""nf4.lora_linear, the operator: values, gradients, dropout, what is kept, compilation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import nf4
from nf4.error import exact
from nf4.reference.dropout_mask import dropout_mask

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "lora_A", "lora_B", "bias")


@pytest.fixture
def q() -> nf4.NF4Tensor:
    return nf4.quantize(torch.randn(24, 66) / 8)


def arguments(m: int = 5, r: int = 3, dtype=torch.float32, grad: bool = True):
    """Make x, lora_A, lora_B and bias for a weight [24, 66]."""
    made = [torch.randn(m, 66), torch.randn(r, 66), torch.randn(24, r), torch.randn(24)]
    return [t.to(dtype).requires_grad_(grad) for t in made]


@pytest.mark.parametrize("r", [1, 3, 16, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_linear_and_its_gradients_are_right(q, dtype, r) -> None:
    leaves = arguments(33, r, dtype)
    x, a, b, bias = leaves
    dy = torch.randn(33, 24).to(dtype)
    y = nf4.lora_linear(x, q, a, b, 0.5, bias)
    grads = torch.autograd.grad(y, leaves, dy)
    x, a, b, bias = (t.detach() for t in leaves)
    right = exact.LoraLinear(x, q, a, b, 0.5, bias, dy)
    for name, found in zip(("y", "dx", "dA", "dB", "dbias"), (y, *grads), strict=True):
        assert found.dtype == dtype and getattr(right, name).share(found) <= 1, name


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_linear_gradcheck_in_float64(q, p) -> None:
    x, a, b, bias = arguments(dtype=torch.float64)
    seed = torch.tensor(7)

    def f(x, a, b, bias):
        return nf4.lora_linear(x.view(5, 1, 66), q, a, b, 2.0, bias, p, seed)

    assert torch.autograd.gradcheck(f, (x, a, b, bias))


@pytest.mark.parametrize("wanted", NAMES)
def test_lora_linear_gives_gradients_only_where_asked(q, wanted) -> None:
    made = dict(zip(NAMES, arguments(grad=False), strict=True))
    made[wanted].requires_grad_()
    nf4.lora_linear(
        made["x"], q, made["lora_A"], made["lora_B"], 2.0, made["bias"]
    ).sum().backward()
    assert [name for name in NAMES if made[name].grad is not None] == [wanted]
    assert all(t.grad is None for t in q.tensors())


def test_lora_linear_takes_fp32_adapters_with_bf16_input(q) -> None:
    x, a, b, bias = arguments()
    y = nf4.lora_linear(x.bfloat16(), q, a, b, 1.0, bias)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == bias.grad.dtype == torch.float32


def test_lora_linear_dropout_follows_the_seed_and_scales(q) -> None:
    x, a, b, _ = arguments(grad=False)
    seed = torch.tensor(11)
    dropped = x * dropout_mask(seed, x.shape, 0.4) / 0.6
    y = nf4.lora_linear(x, q, a, b, 2.0, dropout_p=0.4, seed=seed)
    expected = nf4.linear(x, q) + 2 * dropped @ a.T @ b.T
    torch.testing.assert_close(y, expected)


def test_lora_linear_dropout_draws_from_torch_s_generator(q) -> None:
    x, a, b, _ = arguments(grad=False)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(nf4.lora_linear(x, q, a, b, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_lora_linear_keeps_packed_weight_x_and_t_only(p) -> None:
    q = nf4.quantize(torch.randn(256, 512))
    x = torch.randn(8, 512, requires_grad=True)
    a, b = torch.randn(4, 512, requires_grad=True), torch.randn(256, 4, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nf4.lora_linear(x, q, a, b, dropout_p=p)
    t, seed = 4 * 8 * 4, 8 if p else 0
    assert sum(t.nbytes for t in saved) == q.nbytes + x.nbytes + a.nbytes + b.nbytes + t + seed


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_linear_gives_the_same_gradients_under_checkpointing(q, reentrant) -> None:
    results = []
    for run in (False, True):
        torch.manual_seed(3)
        x, a, b, bias = arguments()

        def f(x, a=a, b=b, bias=bias):
            return nf4.lora_linear(x, q, a, b, 2.0, bias, dropout_p=0.25).tanh()

        torch.manual_seed(4)
        y = checkpoint(f, x, use_reentrant=reentrant) if run else f(x)
        y.sum().backward()
        results.append([t.grad for t in (x, a, b, bias)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_lora_linear_autocast_equals_casting_by_hand(q) -> None:
    x, a, b, bias = arguments()
    by_hand = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4.lora_linear(x, q, a, b, 2.0, bias)
    grads = torch.autograd.grad(y.sum(), (x, a, b, bias))
    y2 = nf4.lora_linear(by_hand, q, a, b, 2.0, bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, y2)
    expected = torch.autograd.grad(y2.sum(), (by_hand, a, b, bias))
    assert all(torch.equal(g, e.to(g.dtype)) for g, e in zip(grads, expected, strict=True))


def test_lora_linear_refuses_a_second_derivative(q) -> None:
    x, a, b, _ = arguments()
    y = nf4.lora_linear(x, q, a, b).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient of a gradient"):
        grad.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_lora_linear_passes_opcheck(q, p) -> None:
    x, a, b, bias = arguments()
    seed = torch.tensor(5) if p else None
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(
        torch.ops.nf4.lora_linear.default, (x, *q.tensors(), bias, a, b, 2.0, p, seed, True, 64)
    )
    dy, t = torch.randn(5, 24), torch.randn(5, 3)
    for needs in ([True] * 4, [True, False, False, False]):
        saved = (x.detach(), t) if needs[2] else (None, None)
        torch.library.opcheck(
            torch.ops.nf4.lora_linear_backward.default,
            (dy, *saved, *q.tensors(), a.detach(), b.detach(), 2.0, p, seed, 64, needs),
        )


def test_operators_on_fragments_have_gradients_by_the_dispatcher() -> None:
    """Whose context has flags of more arguments than the operator, and of fewer in rows."""
    q = nf4.quantize(torch.randn(32, 128))
    x, factor = torch.randn(3, 128, requires_grad=True), torch.ones(32, requires_grad=True)
    a, b = torch.randn(4, 128, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    leaves = (x, a, b, factor)

    def f(held):
        return nf4.lora_linear(x, held, a, b) * nf4.linear(x, held, output_factor=factor)

    for held in (q, nf4.to_fragments(q)):
        expected = torch.autograd.grad(f(held).sum(), leaves)
        with FlopCounterMode(display=False):
            found = torch.autograd.grad(f(held).sum(), leaves)
        compiled = torch.compile(lambda held=held: f(held).sum(), backend="aot_eager")
        for grads in (found, torch.autograd.grad(compiled(), leaves)):
            for grad, right in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_lora_linear_compiles_without_graph_breaks(q, p, backend) -> None:
    @torch.compile(fullgraph=True, backend=backend)
    def f(x, a, b, bias):
        return nf4.lora_linear(x, q, a, b, 2.0, bias, p, torch.tensor(9)).tanh()

    x, a, b, bias = arguments()
    y, expected = (
        f(x, a, b, bias),
        nf4.lora_linear(x, q, a, b, 2.0, bias, p, torch.tensor(9)).tanh(),
    )
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.sum(), (x, a, b, bias))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (x, a, b, bias)))


def test_lora_linear_dropout_compiles_and_draws_anew(q, backend) -> None:
    x, a, b, _ = arguments(grad=False)
    f = torch.compile(
        lambda x: nf4.lora_linear(x, q, a, b, dropout_p=0.5), fullgraph=True, backend=backend
    )
    assert not torch.equal(f(x), f(x))
