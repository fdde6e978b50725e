"""T-Few's recipe on a tiny random Llama in NF4 that learns a few random questions by heart."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import nf4
from nf4.commands.demo import t_few
from nf4.commands.demo.t_few import T_FEW, Example, Recipe, accuracy, fine_tune

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = Recipe(steps=40, batch_size=6, learning_rate=5e-2, warmup_steps=4)


@pytest.fixture
def model(tiny_llama) -> nn.Module:
    """Its weights are large, so that a few factors can change what it says."""
    return nf4.add_ia3(nf4.quantize_model(tiny_llama(initializer_range=0.3))).eval()


def questions(count: int = 12) -> list[Example]:
    """Prompts of 3 to 6 tokens with 2 to 4 choices of 1 to 3 tokens, all random."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(320, (length,), generator=generator).tolist())

    found = []
    for i in range(count):
        choices = tuple(draw(1 + (i + j) % 3) for j in range(2 + i % 3))
        found.append(Example(draw(3 + i % 4), choices, i % len(choices)))
    return found


def log_probabilities(model: nn.Module, prompt: tuple, choice: tuple) -> Tensor:
    """Return the log p of each token of one choice, from the model alone and without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + choice])).logits[0].double()
    places = range(len(prompt) - 1, len(prompt) + len(choice) - 1)
    return torch.stack([logits[t].log_softmax(-1)[c] for t, c in zip(places, choice, strict=True)])


def test_the_recipe_is_the_papers() -> None:
    assert dataclasses.asdict(T_FEW) == {
        "steps": 1000,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 60,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        T_FEW.steps = 10


def test_the_learning_rate_rises_for_60_steps_and_falls_to_nothing(model) -> None:
    optimizer, schedule = t_few.optimizer_and_schedule(model, T_FEW)
    rates = [schedule.get_last_lr()[0]]
    for _ in range(T_FEW.steps):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    expected = {0: 0.0, 30: 1.5e-3, 60: 3e-3, 530: 1.5e-3, 999: 3e-3 / 940, 1000: 0.0}
    for step, rate in expected.items():
        assert rates[step] == pytest.approx(rate, rel=1e-12), step
    assert max(rates) == rates[60]


def test_the_optimizer_is_adafactor_on_the_adapter(model) -> None:
    """Its second step changes each factor by the learning rate, in the root mean square."""
    optimizer, _ = t_few.optimizer_and_schedule(model, Recipe(10, 1, 0.1, 0))
    assert type(optimizer).__name__ == "Adafactor"
    (group,) = optimizer.param_groups
    assert not group["relative_step"] and group["weight_decay"] == 0 and group["beta1"] is None
    factors = [p for n, p in model.named_parameters() if "ia3_l" in n]
    assert list(map(id, group["params"])) == list(map(id, factors))
    for p in factors:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in factors:
        assert (p.detach() - 1).square().mean().sqrt() == pytest.approx(0.1, rel=1e-3)


def test_training_learns_the_questions_and_changes_the_factors_alone(model) -> None:
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    assert accuracy(model, questions()) < 0.5
    seen: list[float] = []
    losses = fine_tune(model, questions(), QUICK, progress=seen.append)
    assert len(losses) == 40 and seen == losses
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert accuracy(model, questions()) >= 0.9
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "ia3_l" in name}
    assert len(changed) == 6 and not model.training


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_loss_is_that_of_the_questions_one_by_one(seed, model) -> None:
    """Padding, shifting and missing choices cost nothing: all 12 are in the first batch."""
    (found,) = fine_tune(model, questions(), Recipe(1, 12, 1e-3, 1), seed)
    total = 0.0
    for e in questions():
        logs = [log_probabilities(model, e.prompt, choice) for choice in e.choices]
        wrong = torch.cat([log for i, log in enumerate(logs) if i != e.correct])
        beta = torch.stack([log.mean() for log in logs])
        total += -logs[e.correct].mean() - torch.log(1 - wrong.exp()).mean()
        total += -beta.log_softmax(0)[e.correct]
    assert found == pytest.approx(total.item() / 12, rel=1e-5)  # fp32 sums in another order


def test_accuracy_ranks_choices_by_log_probability_per_token(model) -> None:
    by_mean, by_sum = [], []
    for e in questions(30):
        logs = [log_probabilities(model, e.prompt, choice) for choice in e.choices]
        by_mean.append(max(range(len(logs)), key=lambda i: logs[i].mean()) == e.correct)
        by_sum.append(max(range(len(logs)), key=lambda i: logs[i].sum()) == e.correct)
    assert sum(by_mean) != sum(by_sum)
    for batch_size in (1, 4, 64):
        assert accuracy(model, questions(30), batch_size) == sum(by_mean) / 30


def test_accuracy_leaves_the_model_as_it_was(model) -> None:
    model.train()
    model.lm_head.eval()
    accuracy(model, questions())
    assert model.training and model.model.training and not model.lm_head.training
    assert all(p.grad is None for p in model.parameters())


def test_the_seed_decides_the_order(model) -> None:
    recipe = Recipe(3, 4, 1e-2, 0)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    found = []
    for seed in (5, 5, 6):
        model.load_state_dict(state)
        found.append(fine_tune(model, questions(), recipe, seed))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("batch_size", [5, 12, 30])
def test_all_questions_come_before_one_comes_again(batch_size) -> None:
    recipe = Recipe(24, batch_size, 1e-3, 0)
    batches = list(t_few._batches(12, recipe, 0))
    assert [len(b) for b in batches] == [batch_size] * 24
    order = sum(batches, [])
    passes = [order[i : i + 12] for i in range(0, len(order), 12)]
    assert all(sorted(p) == list(range(12)) for p in passes)
    assert len(set(map(tuple, passes))) == len(passes)


class Letters:
    """A tokenizer of letters, which begins a text by a token of its own."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(c) for c in text])


def test_an_example_of_text_begins_once() -> None:
    found = t_few.example(Letters(), "ab", [" c", " de"], 1)
    assert found == Example((1, 97, 98), ((32, 99), (32, 100, 101)), 1)


def test_made_up_names_hold_out_other_words() -> None:
    shown, held_out = t_few.made_up_names(Letters())
    assert (len(shown), len(held_out)) == (30, 24)
    for part in (shown, held_out):
        assert [e.correct for e in part] == sorted(e.correct for e in part)
        assert {e.correct for e in part} == {0, 1, 2}
    texts = ["".join(map(chr, e.prompt[1:])) for e in shown + held_out]
    assert len(set(texts)) == 54
    assert texts[0] == "A heron is a" and texts[30] == "A lizard is a"
    assert not any(text[2] in "aeiou" for text in texts)
    assert bytes(shown[0].choices[shown[0].correct]) == b" blicket"


BAD_RECIPES = {
    "steps": ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
    "steps_type": ({"steps": 1.5}, TypeError, "steps: expected an int, got float"),
    "batch": ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
    "batch_type": ({"batch_size": True}, TypeError, "batch_size: expected an int, got bool"),
    "rate": ({"learning_rate": 0.0}, ValueError, "learning_rate: expected a positive number"),
    "rate_nan": ({"learning_rate": float("nan")}, ValueError, "learning_rate: .*, got nan"),
    "rate_type": ({"learning_rate": "1"}, TypeError, "learning_rate: expected a number, got str"),
    "warmup": ({"warmup_steps": -1}, ValueError, "warmup_steps: expected at least 0, got -1"),
    "warmup_long": ({"warmup_steps": 1001}, ValueError, "warmup_steps: .* at most 1000 .* 1001"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes_are_refused(case) -> None:
    values, kind, message = BAD_RECIPES[case]
    with pytest.raises(kind, match=message):
        dataclasses.replace(T_FEW, **values)


BAD_EXAMPLES = {
    "no_prompt": (((), ((1,),), 0), "prompt: expected at least one token"),
    "no_choice": (((1,), (), 0), "choices: expected tokens in each"),
    "empty_choice": (((1,), ((1,), ()), 0), "choices: expected tokens in each"),
    "beyond": (((1,), ((1,), (2,)), 2), "correct: expected a choice from 0 to 1, got 2"),
    "negative": (((1,), ((1,), (2,)), -1), "correct: expected a choice from 0 to 1, got -1"),
}


@pytest.mark.parametrize("case", BAD_EXAMPLES)
def test_bad_examples_are_refused(case) -> None:
    arguments, message = BAD_EXAMPLES[case]
    with pytest.raises(ValueError, match=message):
        Example(*arguments)


def test_what_cannot_be_trained_is_refused(model) -> None:
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        fine_tune("gpt2", questions())
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        fine_tune(model, [])
    with pytest.raises(TypeError, match="examples: expected each an Example, got tuple"):
        accuracy(model, [((1,), ((1,),), 0)])
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        accuracy(model, [])
    with pytest.raises(TypeError, match="recipe: expected a Recipe, got int"):
        fine_tune(model, questions(), 10)
    with pytest.raises(TypeError, match="progress: expected a function, got int"):
        fine_tune(model, questions(), QUICK, progress=1)
    frozen = model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected parameters that require a gradient"):
        fine_tune(frozen, questions(), QUICK)
