"""T-Few's and AdaMix's losses, against their formulas written out in 50 digits."""

from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from nf4 import losses
from nf4.losses import FLOOR, choice_scores, consistency_loss, t_few_loss

IGNORED = -100
TERMS = {
    "language_model": losses.language_model_loss,
    "unlikelihood": losses.unlikelihood_loss,
    "length_normalized": losses.length_normalized_loss,
    "sum": t_few_loss,
}
each_term = pytest.mark.parametrize("term", TERMS)
# Sums of some dozen numbers of size 1 to 10, each right to a few roundings of 2^-24 or 2^-53
CLOSE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
pytestmark = pytest.mark.usefixtures("one_thread")
each_dtype = pytest.mark.parametrize("dtype", CLOSE, ids=str)


@pytest.fixture(autouse=True)
def digits():
    with localcontext() as context:
        context.prec = 50
        yield


def ragged(dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Three examples of two, three and one choices, of one to four tokens out of seven.

    Padding lies before, after and amid what counts; whole choices are missing, first ones too.
    """
    n = IGNORED
    labels = torch.tensor(
        [
            [[1, 2, n, n], [3, n, n, n], [n, n, n, n]],
            [[n, 6, 0, 1], [2, 2, 2, 2], [n, n, n, 5]],
            [[n, n, n, n], [4, n, 3, n], [n, n, n, n]],
        ]
    )
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(3, 3, 4, 7, generator=generator, dtype=torch.float64)
    return logits.to(dtype), labels, torch.tensor([0, 2, 1])


def probability(row: Tensor, token: int) -> Decimal:
    powers = [Decimal(x).exp() for x in row.tolist()]
    return powers[token] / sum(powers)


def one_minus(row: Tensor, token: int) -> Decimal:
    """Return 1 - p, which 50 digits would not tell from 0 everywhere."""
    return sum(probability(row, other) for other in range(len(row)) if other != token)


def literal(logits, labels, correct, term: str, mistake: str = "") -> float:
    """Return a term from the paper's formulas, token by token, or with a mistake."""
    total = Decimal(0)
    for x, y, right in zip(logits, labels.tolist(), correct.tolist(), strict=True):
        places = {
            n: [(x[n, t], token) for t, token in enumerate(row) if token != IGNORED]
            for n, row in enumerate(y)
        }
        places = {n: at for n, at in places.items() if at}  # the choices there are
        lengths = {n: 1 if mistake == "no_length" else len(at) for n, at in places.items()}
        beta = {n: sum(probability(*i).ln() for i in at) / lengths[n] for n, at in places.items()}
        wrong = [i for n, at in places.items() for i in at if n != right or mistake == "all"]
        rest = [(probability if mistake == "likelihood" else one_minus)(*i).ln() for i in wrong]
        if term in ("language_model", "sum"):
            total += -beta[right]
        if term in ("unlikelihood", "sum") and wrong:
            total += -sum(rest) / (1 if mistake == "no_division" else len(wrong))
        if term in ("length_normalized", "sum"):
            others = [b.exp() for n, b in beta.items() if n != right or mistake != "others"]
            total += (sum(others) or Decimal(1)).ln() - beta[right]
    return float(total / (1 if mistake == "summed" else len(labels)))


@each_dtype
@each_term
def test_terms_are_the_papers_formulas(term, dtype) -> None:
    logits, labels, correct = ragged(dtype)
    found = TERMS[term](logits, labels, correct)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == ()
    assert found.item() == pytest.approx(literal(*ragged(dtype), term), rel=CLOSE[dtype])


MISTAKES = {
    "language_model": ("no_length", "summed"),
    "unlikelihood": ("no_division", "likelihood", "all", "summed"),
    "length_normalized": ("no_length", "others", "summed"),
}


@pytest.mark.parametrize(
    ("term", "mistake"), [(t, m) for t, all_of_it in MISTAKES.items() for m in all_of_it]
)
def test_formulas_with_a_mistake_are_told_apart(term, mistake) -> None:
    """By far more than the tolerance above, which else would let it pass."""
    for name in (term, "sum"):
        found = TERMS[name](*ragged()).item()
        assert abs(literal(*ragged(), name, mistake) / found - 1) > 0.005


def test_terms_of_a_model_that_knows_nothing() -> None:
    labels = torch.randint(8, (2, 3, 5))
    arguments = (torch.zeros(2, 3, 5, 8), labels, torch.tensor([2, 0]))
    exact = {"language_model": 8, "unlikelihood": 8 / 7, "length_normalized": 3, "sum": 3 * 64 / 7}
    for term, value in exact.items():
        assert TERMS[term](*arguments).exp().item() == pytest.approx(value, rel=2e-6)


def test_each_example_counts_the_same() -> None:
    logits, labels, correct = ragged()
    for function in TERMS.values():
        alone = [
            function(logits[i : i + 1], labels[i : i + 1], correct[i : i + 1]) for i in (0, 1, 2)
        ]
        torch.testing.assert_close(function(logits, labels, correct), torch.stack(alone).mean())


def test_scores_are_the_mean_log_probability_of_each_choice() -> None:
    logits, labels, _ = ragged()
    found = choice_scores(logits, labels)
    for x, row, score in zip(
        logits.flatten(0, 1), labels.flatten(0, 1), found.flatten(), strict=True
    ):
        at = [t for t in range(4) if row[t] != IGNORED]
        if not at:
            assert score == -torch.inf
            continue
        logs = [float(probability(x[t], row[t].item()).ln()) for t in at]
        assert score.item() == pytest.approx(sum(logs) / len(logs), rel=1e-14)


@each_term
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf, 1e30], ids=str)
def test_what_does_not_count_changes_nothing(junk, term) -> None:
    """Padding at the end, a choice more, and any logits wherever no label is."""
    logits, labels, correct = ragged()
    function, logits = TERMS[term], logits.requires_grad_()
    expected = function(logits, labels, correct)
    (grad,) = torch.autograd.grad(expected, logits)
    more = torch.full((3, 4, 6), IGNORED)
    more[:, :3, :4] = labels
    padded = torch.full((3, 4, 6, 7), junk, dtype=torch.float64)
    padded[:, :3, :4] = torch.where((labels == IGNORED)[..., None], junk, logits.detach())
    padded.requires_grad_()
    found = function(padded, more, correct)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(padded.grad[:, :3, :4], grad, rtol=1e-14, atol=1e-16)
    assert torch.count_nonzero(padded.grad[more == IGNORED]) == 0


@each_term
@pytest.mark.parametrize("index", [-1, 6, 7], ids=["minus_one", "token", "beyond"])
def test_any_label_may_be_the_one_that_does_not_count(index, term) -> None:
    logits, labels, correct = ragged()
    labels[labels == 6] = 5
    other = torch.where(labels == IGNORED, index, labels)
    found = TERMS[term](logits, other, correct, ignore_index=index)
    assert torch.equal(found, TERMS[term](logits, labels, correct))


def test_an_example_with_a_single_choice_has_only_the_language_models_term() -> None:
    logits = torch.randn(1, 2, 3, 5, requires_grad=True)
    labels = torch.tensor([[[1, 2, 3], [IGNORED] * 3]])
    correct = torch.tensor([0])
    for term in ("unlikelihood", "length_normalized"):
        found = TERMS[term](logits, labels, correct)
        (grad,) = torch.autograd.grad(found, logits)
        assert found.item() == 0
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-7)
    assert t_few_loss(logits, labels, correct) == TERMS["language_model"](logits, labels, correct)


GAPS = [0.0, 1.0, 20.0, 60.0, 104.0, 1e4, 131008.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gap", GAPS)
def test_unlikelihood_of_a_certain_token(gap, dtype) -> None:
    """p rounds to 1 from a gap of 17 on in fp32; 131008 is the widest of float16."""
    row = torch.full((4,), -gap / 2, dtype=dtype)
    row[2] = gap / 2
    logits = torch.stack([torch.zeros_like(row), row])[None, :, None].requires_grad_()
    found = losses.unlikelihood_loss(logits, torch.tensor([[[0], [2]]]), torch.tensor([0]))
    found.backward()
    exact = -one_minus(row, 2).ln()
    assert found.item() == pytest.approx(float(exact), rel=CLOSE[dtype])
    p = float(probability(row, 2))  # the gradient; the others have the opposite between them
    expected = [-p / 3, -p / 3, p, -p / 3]
    # It is exp(log p - log(1 - p)), which an error of log(1 - p), of gap times eps, takes along
    computed = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    tolerance = CLOSE[dtype] + computed * gap + torch.finfo(dtype).eps
    assert logits.grad[0, 1, 0].tolist() == pytest.approx(expected, rel=tolerance)
    assert torch.count_nonzero(logits.grad[0, 0]) == 0


@each_dtype
def test_unlikelihood_of_the_only_possible_token_is_finite(dtype) -> None:
    """log(1 - 1): a bound, and no gradient, as no logit changes that p is 1."""
    logits = torch.full((1, 2, 1, 4), -torch.inf, dtype=dtype)
    logits[0, :, 0, 2] = 3.0
    logits.requires_grad_()
    labels, correct = torch.tensor([[[2], [2]]]), torch.tensor([0])
    found = losses.unlikelihood_loss(logits, labels, correct)
    found.backward()
    assert found.item() == -FLOOR > 2 * torch.finfo(torch.float16).max
    assert torch.count_nonzero(logits.grad) == 0
    assert t_few_loss(logits, labels, correct).isfinite()


@each_term
def test_impossible_wrong_choices_cost_nothing(term) -> None:
    """p = 0: log p is -inf and log(1 - p) is 0, and neither makes a gradient NaN."""
    logits = torch.zeros(1, 3, 2, 4)
    logits[0, 1:, :, 3] = -torch.inf
    logits.requires_grad_()
    labels = torch.tensor([[[0, 1], [3, 3], [3, 3]]])
    found = TERMS[term](logits, labels, torch.tensor([0]))
    found.backward()
    exact = {"unlikelihood": 1, "length_normalized": 1}.get(term, 4)
    assert found.exp().item() == pytest.approx(exact, rel=2e-6)
    assert logits.grad.isfinite().all()


@each_term
@pytest.mark.parametrize("scale", [1.0, 1e2, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_logits_have_finite_losses_and_gradients(dtype, scale, term) -> None:
    logits, labels, correct = ragged()
    logits = (logits.clamp(-2, 2) * scale).to(dtype).requires_grad_()
    found = TERMS[term](logits, labels, correct)
    found.backward()
    assert found.item() == pytest.approx(literal(logits.detach(), labels, correct, term), rel=4e-6)
    double = logits.detach().double().requires_grad_()
    TERMS[term](double, labels, correct).backward()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.double(), double.grad, rtol=4 * rounding, atol=1e-6)


@each_term
def test_gradients_are_those_of_differences(term) -> None:
    logits, labels, correct = ragged()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TERMS[term](x, labels, correct), logits)
    again = {"fast_mode": True}  # along random directions
    assert torch.autograd.gradgradcheck(lambda x: TERMS[term](x, labels, correct), logits, **again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_term
def test_half_precision_is_computed_in_fp32(term, dtype) -> None:
    logits, labels, correct = ragged(dtype)
    wide = logits.float().requires_grad_()
    logits.requires_grad_()
    found, expected = (TERMS[term](x, labels, correct) for x in (logits, wide))
    assert torch.equal(found, expected)
    found.backward()
    expected.backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, wide.grad.to(dtype), rtol=0, atol=0)


def test_a_causal_models_logits_are_shifted_by_the_caller(tiny_llama) -> None:
    model = tiny_llama()
    tokens = torch.randint(320, (4, 1, 9))
    labels = tokens.clone()
    labels[..., :3] = IGNORED
    logits = model(tokens[:, 0]).logits[:, None]
    found = losses.language_model_loss(
        logits[..., :-1, :], labels[..., 1:], torch.zeros(4, dtype=torch.int64)
    )
    expected = model(tokens[:, 0], labels=labels[:, 0]).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def two_passes(dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of three sequences of four tokens out of seven, labels, and an impossible token."""
    generator = torch.Generator().manual_seed(5)
    a, b = 2 * torch.randn(2, 3, 4, 7, generator=generator, dtype=torch.float64)
    a[..., 6] = b[..., 6] = -torch.inf
    labels = torch.tensor([[IGNORED, 1, 2, IGNORED], [3, 4, 5, 0], [IGNORED] * 4])
    return a.to(dtype), b.to(dtype), labels


def literal_divergence(a: Tensor, b: Tensor, labels: Tensor | None) -> float:
    found = []
    for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        if labels is not None and labels[i, j] == IGNORED:
            continue
        p, q = ([probability(x[i, j], token) for token in range(6)] for x in (a, b))
        pairs = list(zip(p, q, strict=True))
        forward = sum(x * (x / y).ln() for x, y in pairs)
        back = sum(y * (y / x).ln() for x, y in pairs)
        found.append((forward + back) / 2)
    return float(sum(found) / len(found))


@each_dtype
@pytest.mark.parametrize("with_labels", [False, True], ids=["all", "labels"])
def test_consistency_is_half_of_both_divergences(with_labels, dtype) -> None:
    a, b, labels = two_passes(dtype)
    labels = labels if with_labels else None
    found = consistency_loss(a, b, labels)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = literal_divergence(a, b, labels)
    assert found.item() == pytest.approx(exact, rel=CLOSE[dtype])
    assert consistency_loss(b, a, labels).item() == pytest.approx(exact, rel=CLOSE[dtype])


def test_consistency_of_two_values() -> None:
    """p = (3, 1) / 4 and q = (1, 3) / 4: both divergences are log(3) / 2, in nats."""
    a = torch.tensor([3.0, 1.0]).log()
    assert consistency_loss(a, a.flip(0)).item() == pytest.approx(0.5493061, rel=1e-6)


def test_consistency_of_equal_passes_is_nothing() -> None:
    a, _, labels = two_passes(torch.float32)
    a.requires_grad_()
    b = a.detach().clone().requires_grad_()
    found = consistency_loss(a, b, labels)
    found.backward()
    assert found.item() == 0
    assert torch.count_nonzero(a.grad) == torch.count_nonzero(b.grad) == 0


def test_consistency_pulls_both_passes_together() -> None:
    """Half a step down the gradient of either alone lowers it; what is ignored gets none."""
    a, b, labels = two_passes()
    a.requires_grad_(), b.requires_grad_()
    found = consistency_loss(a, b, labels)
    found.backward()
    with torch.no_grad():
        assert consistency_loss(a - 0.1 * a.grad, b, labels) < found
        assert consistency_loss(a, b - 0.1 * b.grad, labels) < found
    for x in (a, b):
        assert torch.count_nonzero(x.grad[labels == IGNORED]) == 0
        assert torch.count_nonzero(x.grad[..., 6]) == 0


def test_gradients_of_consistency_are_those_of_differences() -> None:
    a, b, labels = two_passes()
    a, b = (x[..., :6].contiguous().requires_grad_() for x in (a, b))

    def masked(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full((3, 4, 1), -torch.inf, dtype=x.dtype)], dim=-1)

    assert torch.autograd.gradcheck(lambda x, y: consistency_loss(x, y, labels), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: consistency_loss(masked(x), masked(y)), (a, b))
    same = a.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(consistency_loss, (a, same), fast_mode=True)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_consistency_reads_no_logits_that_do_not_count(junk) -> None:
    a, b, labels = two_passes()
    expected = consistency_loss(a, b, labels)
    a, b = (torch.where((labels == IGNORED)[..., None], junk, x).requires_grad_() for x in (a, b))
    found = consistency_loss(a, b, labels)
    found.backward()
    assert torch.equal(found, expected)
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_consistency_where_one_pass_alone_rules_a_token_out() -> None:
    a, b, _ = two_passes()
    b[..., 6] = 0
    assert consistency_loss(a, b) == consistency_loss(b, a) == torch.inf


@pytest.mark.parametrize("scale", [1e2, 3e4])
@each_dtype
def test_consistency_of_large_logits(dtype, scale) -> None:
    a, b, labels = two_passes()
    a, b = ((x.clamp(-2, 2) * scale).to(dtype).requires_grad_() for x in (a, b))
    found = consistency_loss(a, b, labels)
    found.backward()
    exact = literal_divergence(a.detach(), b.detach(), labels)
    assert found.item() == pytest.approx(exact, rel=CLOSE[dtype])
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


def calls() -> dict:
    a, b, labels = two_passes(torch.float32)
    found = {term: (function, ragged(torch.float32)) for term, function in TERMS.items()}
    return {**found, "consistency": (consistency_loss, (a, b, labels))}


def gradients(function, arguments) -> list[Tensor]:
    logits = [x.clone().requires_grad_() for x in arguments if x.is_floating_point()]
    loss = function(*logits, *(x for x in arguments if not x.is_floating_point()))
    return [loss.detach(), *torch.autograd.grad(loss, logits)]


@pytest.mark.parametrize("name", [*TERMS, "consistency"])
def test_losses_compile_into_one_graph(name) -> None:
    function, arguments = calls()[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        gradients(compiled, arguments), gradients(function, arguments), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["sum", "consistency"])
def test_losses_are_the_same_from_the_compiler(name, backend) -> None:
    function, arguments = calls()[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for found, expected in zip(
        gradients(compiled, arguments), gradients(function, arguments), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_losses_under_torch_func() -> None:
    logits, labels, correct = ragged()
    alone = [t_few_loss(logits[i : i + 1], labels[i : i + 1], correct[i : i + 1]) for i in range(3)]
    found = torch.func.vmap(t_few_loss)(logits[:, None], labels[:, None], correct[:, None])
    torch.testing.assert_close(found, torch.stack(alone))
    a, b, labels = two_passes()
    found = torch.func.vmap(consistency_loss)(a[:2], b[:2], labels[:2])
    alone = [consistency_loss(a[i], b[i], labels[i]) for i in (0, 1)]
    torch.testing.assert_close(found, torch.stack(alone))


def test_values_are_not_looked_for_where_there_are_none() -> None:
    logits, labels, correct = (x.to("meta") for x in ragged())
    for function in TERMS.values():
        assert function(logits, labels, correct).is_meta
    a, b, labels = (x.to("meta") for x in two_passes())
    assert consistency_loss(a, b, labels).is_meta


def change(position: int, value) -> tuple:
    arguments = list(ragged())
    arguments[position] = value(arguments[position])
    return tuple(arguments)


def with_label(value: int):
    def set_it(labels: Tensor) -> Tensor:
        labels[1, 1, 1] = value
        return labels

    return set_it


BAD = {
    "logits_list": (0, lambda x: x.tolist(), TypeError, r"logits: expected a torch.Tensor, got li"),
    "logits_int": (0, lambda x: x.long(), TypeError, r"logits: expected one of float16, .*int64"),
    "logits_ndim": (0, lambda x: x[0], ValueError, r"logits: expected shape \(batch, .*, 4, 7\)"),
    "no_batch": (0, lambda x: x[:0], ValueError, r"logits: expected values .*\(0, 3, 4, 7\)"),
    "no_choices": (0, lambda x: x[:, :0], ValueError, r"logits: expected values .*\(3, 0, 4, 7\)"),
    "no_tokens": (0, lambda x: x[:, :, :0], ValueError, r"logits: expected values .*3, 0, 7\)"),
    "no_vocabulary": (0, lambda x: x[..., :0], ValueError, r"logits: expected values .*4, 0\)"),
    "labels_list": (1, lambda x: x.tolist(), TypeError, r"labels: expected a torch.Tensor, got li"),
    "labels_int32": (1, lambda x: x.int(), TypeError, r"labels: expected torch.int64, got .*int32"),
    "labels_shape": (1, lambda x: x[..., 1:], ValueError, r"labels: expected shape \(3, 3, 4\)"),
    "labels_device": (1, lambda x: x.to("meta"), ValueError, r"labels: expected device cpu"),
    "label_beyond": (1, with_label(7), ValueError, r"labels: expected tokens from 0 to 6 .* got 7"),
    "label_negative": (1, with_label(-1), ValueError, r"labels: expected tokens .* got -1"),
    "correct_int": (2, lambda x: 0, TypeError, r"correct: expected a torch.Tensor, got int"),
    "correct_bool": (2, lambda x: x > 0, TypeError, r"correct: expected torch.int64, .*bool"),
    "correct_shape": (2, lambda x: x[:2], ValueError, r"correct: expected shape \(3,\) .*\(2,\)"),
    "correct_device": (2, lambda x: x.to("meta"), ValueError, r"correct: expected device cpu"),
    "correct_beyond": (2, lambda x: x + 3, ValueError, r"correct: .* 0 to 2, got 3 for example 0"),
    "correct_negative": (2, lambda x: -x, ValueError, r"correct: .* got -2 for example 1"),
    "correct_empty": (2, lambda x: x * 0, ValueError, r"correct: .* got 0 for example 2, .*-100"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@each_term
def test_bad_arguments_are_refused(term, case) -> None:
    position, value, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        TERMS[term](*change(position, value))


@each_term
@pytest.mark.parametrize("index", [True, None, -100.0], ids=str)
def test_ignore_index_is_an_integer(index, term) -> None:
    with pytest.raises(TypeError, match=r"ignore_index: expected an int, got"):
        TERMS[term](*ragged(), ignore_index=index)
    with pytest.raises(TypeError, match=r"ignore_index: expected an int, got"):
        consistency_loss(*two_passes(), ignore_index=index)


def test_scores_check_what_they_take() -> None:
    logits, labels, _ = ragged()
    with pytest.raises(ValueError, match=r"labels: expected tokens from 0 to 6 or -100, got 9"):
        choice_scores(logits, with_label(9)(labels))
    with pytest.raises(TypeError, match=r"logits: expected a torch.Tensor, got NoneType"):
        choice_scores(None, labels)


BAD_PASSES = {
    "a_list": (0, lambda x: x.tolist(), TypeError, r"logits_a: expected a torch.Tensor, got list"),
    "a_int": (0, lambda x: x.nan_to_num().int(), TypeError, r"logits_a: expected one of float16"),
    "a_scalar": (0, lambda x: x[0, 0, 0], ValueError, r"logits_a: expected values to count, got"),
    "b_list": (1, lambda x: x.tolist(), TypeError, r"logits_b: expected a torch.Tensor, got list"),
    "b_empty": (1, lambda x: x[:0], ValueError, r"logits_b: expected values to count, got"),
    "b_shape": (1, lambda x: x[..., 1:], ValueError, r"logits_b: expected shape \(3, 4, 7\) f"),
    "b_dtype": (1, lambda x: x.float(), TypeError, r"logits_b: expected torch.float64, got .*32"),
    "b_device": (1, lambda x: x.to("meta"), ValueError, r"logits_b: expected device cpu like lo"),
    "labels_list": (2, lambda x: x.tolist(), TypeError, r"labels: expected a torch.Tensor, got l"),
    "labels_shape": (2, lambda x: x[1], ValueError, r"labels: expected shape \(3, 4\) for lo"),
    "labels_float": (2, lambda x: x.float(), TypeError, r"labels: expected torch.int64, got"),
    "labels_device": (2, lambda x: x.to("meta"), ValueError, r"labels: expected device cpu"),
    "no_labels": (2, lambda x: x * 0 - 100, ValueError, r"labels: expected some .* -100, got none"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PASSES)
def test_bad_passes_are_refused(case) -> None:
    position, value, kind, message = BAD_PASSES[case]
    arguments = list(two_passes())
    arguments[position] = value(arguments[position])
    with pytest.raises(kind, match=message):
        consistency_loss(*arguments)


@pytest.mark.parametrize("gap", [-50.0, -80.0, -120.0, -200.0])
def test_consistency_is_infinite_where_one_pass_rules_a_token_out(gap) -> None:
    a, b = torch.tensor([[0.0, gap]]), torch.tensor([[0.0, -torch.inf]])
    assert consistency_loss(a, b).item() == torch.inf == consistency_loss(b, a).item()
