"""T-Few's recipe: few-shot training on questions with choices, and a small task to try it on.

The paper trains (IA)³ on T0, an encoder-decoder; here the recipe is for causal language models.
It trains whatever requires a gradient: what `nf4.add_ia3` adds, or another adapter.
Source: Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nf4.error.activations import evaluating
from nf4.losses import choice_scores, t_few_loss
from nf4.models.quantize import check_callback, check_model
from nf4.tools.training import trainable

IGNORED = -100
# Three things and a made-up name for each; no model can know the names before it is told
NAMES = {
    "blicket": "heron fox badger salmon spider horse beetle whale raven goat lizard rabbit "
    "wolf duck mouse trout cow crab",
    "dax": "palm tulip fern moss cedar rose wheat clover willow daisy pine reed "
    "maple lily barley birch nettle thistle",
    "wug": "hammer saw chisel wrench drill shovel rake plane file ladder vise screwdriver "
    "spade mallet broom clamp hoe needle",
}
SHOWN = 10  # of each name's words are to train on, the rest is held out


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Attributes:
        steps: steps of the optimizer, at least 1.
        batch_size: examples a step, each with all its choices.
        learning_rate: peak learning rate of Adafactor.
        warmup_steps: steps in which the learning rate rises from 0; then it falls linearly and
            would be 0 at the step after the last.

    Raises:
        TypeError: a number is of another type.
        ValueError: a number is out of range, or warmup_steps is above steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps: expected at most {self.steps} like steps, got {self.warmup_steps}"
            )
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise TypeError(f"learning_rate: expected a number, got {type(rate).__name__}")
        if not 0 < rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {rate}")


# Section 3.5: the same for every data set
T_FEW = Recipe(steps=1000, batch_size=8, learning_rate=3e-3, warmup_steps=60)


@dataclass(frozen=True)
class Example:
    """A question with choices, in tokens.

    Attributes:
        prompt: what the model reads first, at least one token.
        choices: what may come next, each of at least one token.
        correct: which of the choices is right.

    Raises:
        ValueError: there is no prompt, no choice or no token in one, or correct is out of range.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    correct: int

    def __post_init__(self) -> None:
        """Check that there is what a model needs."""
        if not self.prompt:
            raise ValueError("prompt: expected at least one token, got none")
        if not self.choices or not all(self.choices):
            raise ValueError(f"choices: expected tokens in each, got {self.choices}")
        if not 0 <= self.correct < len(self.choices):
            raise ValueError(
                f"correct: expected a choice from 0 to {len(self.choices) - 1}, got {self.correct}"
            )


def example(tokenizer: Any, prompt: str, choices: Sequence[str], correct: int) -> Example:
    """Return a question with choices in the tokens of a model.

    Args:
        tokenizer: of the model.
        prompt: a text.
        choices: texts that may come next, with the space between if there is to be one.
        correct: which of the choices is right.

    Raises:
        ValueError: as for `Example`.
    """
    rows = (tokenizer(choice, add_special_tokens=False).input_ids for choice in choices)
    return Example(tuple(tokenizer(prompt).input_ids), tuple(map(tuple, rows)), correct)


def made_up_names(tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """Return questions after made-up names of animals, plants and tools: "A heron is a blicket".

    Which name goes with which kind of thing can only be learned from the examples.

    Args:
        tokenizer: of the model.

    Returns:
        30 examples to train on, and 24 held-out ones, of other words.
    """
    names = [f" {name}" for name in NAMES]
    shown, held_out = [], []
    for correct, words in enumerate(NAMES.values()):
        found = [example(tokenizer, f"A {w} is a", names, correct) for w in words.split()]
        shown += found[:SHOWN]
        held_out += found[SHOWN:]
    return shown, held_out


def optimizer_and_schedule(
    model: nn.Module, recipe: Recipe
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return Adafactor on a model's trained parameters, and the recipe's learning rates.

    As Adafactor does, a step is scaled by the root mean square of what it changes: for (IA)³, whose
    factors are near one, by about one.

    Raises:
        ValueError: no parameter of the model requires a gradient.
    """
    from transformers import Adafactor, get_linear_schedule_with_warmup

    parameters = trainable(model)
    if not parameters:
        raise ValueError(
            "model: expected parameters that require a gradient, as nf4.add_ia3 adds, found none"
        )
    optimizer = Adafactor(parameters, lr=recipe.learning_rate, relative_step=False)
    schedule = get_linear_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    return optimizer, schedule


def fine_tune(
    model: nn.Module,
    examples: Sequence[Example],
    recipe: Recipe = T_FEW,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> list[float]:
    """Train a model on questions with choices as T-Few does, and leave it in evaluation mode.

    Args:
        model: a causal language model with an adapter, see `nf4.add_ia3`, that returns an object
            with ``logits`` ``[rows, T, vocabulary]``.
        examples: all of them are seen, in a new order, before one is seen again.
        recipe: how long and how fast.
        seed: of the order.
        progress: called with the loss after each step.

    Returns:
        The loss of each step: `nf4.losses.t_few_loss`, in nats.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no example, or no parameter of the model requires a gradient.
    """
    _check(model, examples)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {type(recipe).__name__}")
    check_callback(progress, "progress")
    optimizer, schedule = optimizer_and_schedule(model, recipe)
    losses = []
    model.train()
    for chosen in _batches(len(examples), recipe, seed):
        logits, labels, correct = choice_logits(model, [examples[i] for i in chosen])
        loss = t_few_loss(logits, labels, correct, IGNORED)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if progress is not None:
            progress(losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, examples: Sequence[Example], batch_size: int = 8) -> float:
    """Return the share of questions whose right choice has the highest log p per token.

    Args:
        model: as for `fine_tune`.
        examples: at least one.
        batch_size: examples that are run at once.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no example.
    """
    _check(model, examples)
    right = 0
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            logits, labels, correct = choice_logits(model, examples[start : start + batch_size])
            best = choice_scores(logits, labels, IGNORED).argmax(dim=-1)
            right += int((best == correct).sum())
    return right / len(examples)


def choice_logits(model: nn.Module, batch: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Run a model on each prompt with each of its choices.

    Args:
        model: as for `fine_tune`.
        batch: at least one example.

    Returns:
        Logits ``[batch, choices, length, vocabulary]``, int64 labels ``[batch, choices, length]``,
        -100 where no choice is, and int64 ``[batch]``, which choice is correct: what the losses of
        `nf4.losses` take.
    """
    count = max(len(e.choices) for e in batch)
    # Where an example has no such choice, its prompt alone
    rows = [(e.prompt, c) for e in batch for c in (*e.choices, *[()] * (count - len(e.choices)))]
    # Padding is at the end, where a causal model does not look: no mask is needed
    tokens = _padded([prompt + choice for prompt, choice in rows], 0)
    labels = _padded([(IGNORED,) * len(prompt) + choice for prompt, choice in rows], IGNORED)
    device = next(model.parameters()).device
    logits = model(tokens.to(device)).logits
    first = min(len(e.prompt) for e in batch)  # before it is no label
    logits, labels = logits[:, first - 1 : -1], labels[:, first:].to(device)
    correct = torch.tensor([e.correct for e in batch], device=device)
    shape = (len(batch), count, labels.shape[1])
    return logits.view(*shape, logits.shape[-1]), labels.view(shape), correct


def _batches(count: int, recipe: Recipe, seed: int) -> Iterator[list[int]]:
    """Yield which examples each step takes."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(recipe.steps):
        while len(order) < recipe.batch_size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[: recipe.batch_size]
        del order[: recipe.batch_size]


def _padded(rows: Sequence[tuple[int, ...]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], True, value)


def _check(model: nn.Module, examples: Sequence[Example]) -> None:
    check_model(model)
    for e in examples:
        if not isinstance(e, Example):
            raise TypeError(f"examples: expected each an Example, got {type(e).__name__}")
    if not examples:
        raise ValueError("examples: expected at least one, got none")
