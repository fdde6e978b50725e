"""The demo's fine-tuning loop, and the race of one step against the dense model's."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

BATCH = 1
LENGTH = 256


def batches(tokens: Tensor, steps: int, seed: int) -> Tensor:
    """Return random windows of the training text, int64 ``[steps, 1, 256]``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - LENGTH, (steps, BATCH), generator=generator)
    return tokens[starts[..., None] + torch.arange(LENGTH)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that need a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def train_step(model: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """Take one step and return the loss, in nats per token."""
    loss: Tensor = model(batch, labels=batch).loss
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(
    model: nn.Module,
    data: Tensor,
    lr: float,
    progress: Callable[[float, float], None],
) -> tuple[list[float], float]:
    """Fine-tune a model with AdamW.

    Args:
        model: a causal language model that takes ``labels``.
        data: int64 ``[steps, batch, T]``.
        lr: peak learning rate; it warms up over a tenth of the steps and then falls to zero.
        progress: called with (loss in nats, tokens per second) after each step.

    Returns:
        The loss of each step, and the tokens per second over all steps.
    """
    model.train()
    optimizer = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0)
    warm_up, steps = max(1, len(data) // 10), len(data)
    losses = []
    begin = time.perf_counter()
    for step, batch in enumerate(data):
        factor = min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1), 1.0)
        optimizer.param_groups[0]["lr"] = lr * factor
        losses.append(train_step(model, batch, optimizer))
        speed = (step + 1) * batch.numel() / (time.perf_counter() - begin)
        progress(losses[-1], speed)
    model.eval()
    return losses, data.numel() / (time.perf_counter() - begin)


def race(
    models: tuple[nn.Module, nn.Module], batch: Tensor, rounds: int, progress: Callable[[], None]
) -> tuple[float, float]:
    """Time training steps of two models in turn; a learning rate of 0 leaves both as they are.

    Returns:
        Seconds of the fastest step of each: what else runs on the machine can only add to them.
    """
    optimizers = [torch.optim.AdamW(trainable(m), lr=0.0, weight_decay=0.0) for m in models]
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for i, model in enumerate(models):
            model.train()
            begin = time.perf_counter()
            train_step(model, batch, optimizers[i])
            seconds[i].append(time.perf_counter() - begin)
            model.eval()
            progress()
    first, second = (s[1:] for s in seconds)  # the first round warms up
    return min(first), min(second)
