"""The methods that are compared: what each adds to a model, and the loss that it trains by."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import nf4
from nf4.bench.model.contenders import computing_in
from nf4.commands.comparison.options import DTYPES as DTYPE_NAMES
from nf4.commands.comparison.options import LEARNING_RATES as LR
from nf4.losses import consistency_loss

# For "float32" weights that stay dense are in fp32, and products too; for "bfloat16" both are in
# bf16, the products by autocast, and adapters are in fp32
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
ALPHA_PER_RANK = 2  # lora_alpha = 2 r, as in the demo


@dataclass(frozen=True)
class Method:
    """One way to fine-tune a model.

    Attributes:
        label: for tables.
        quantized: whether the model's linear layers are in 4 bits, or dense.
        note: what a reader of its figures must know.
        lr: peak learning rate; None if nothing is trained.
        add: adds the adapter to a model in place, for a rank; None if nothing is trained.
        finish: makes of the trained model, in place, what is scored and saved; None for nothing.
        two_draws: whether a step takes two forward passes, held together by a consistency loss.
    """

    label: str
    quantized: bool
    note: str
    lr: float | None = None
    add: Callable[[nn.Module, int], Any] | None = None
    finish: Callable[[nn.Module], Any] | None = None
    two_draws: bool = False


def _add_lora(model: nn.Module, r: int) -> None:
    nf4.add_lora(model, r=r, lora_alpha=ALPHA_PER_RANK * r, target_modules="all-linear")


def _add_ia3(model: nn.Module, r: int) -> None:
    nf4.add_ia3(model)


def _add_adamix(model: nn.Module, r: int) -> None:
    nf4.add_adamix(model, r=r, lora_alpha=ALPHA_PER_RANK * r, target_modules="all-linear")


def _merge_adamix(model: nn.Module) -> None:
    nf4.merge_adamix(model)


METHODS = {
    "base": Method("4-bit base", True, "not trained"),
    "lora": Method(
        "LoRA, dense", False, "on the weights as they were loaded", LR["lora"], _add_lora
    ),
    "qlora": Method("QLoRA", True, "LoRA on 4-bit weights", LR["qlora"], _add_lora),
    "t-few": Method(
        "T-Few, (IA)³",
        True,
        "(IA)³ vectors on 4-bit weights, by the language model's loss alone: T-Few's two other "
        "terms need answers to choose from, which a text has not",
        LR["t-few"],
        _add_ia3,
    ),
    "adamix": Method(
        "AdaMix",
        True,
        "a mixture of four LoRA modules a layer on 4-bit weights; a step is two forward passes "
        "with other modules drawn, of which the first one's loss and their consistency loss are "
        "trained; trainable parameters are those of all modules, perplexity after and adapter "
        "those of the one LoRA that they are averaged to",
        LR["adamix"],
        _add_adamix,
        _merge_adamix,
        two_draws=True,
    ),
}


class Objective(nn.Module):
    """A causal language model with the loss that a method trains by.

    With two draws this is AdaMix's (https://arxiv.org/abs/2205.12410, section 3.2): cross-entropy
    of a first forward pass, plus the symmetric Kullback-Leibler divergence between it and a second.

    Args:
        model: as in transformers; it draws its modules itself.
        dtype: of products.
        two_draws: whether the loss is of two forward passes.

    Attributes:
        losses: cross-entropy of each batch trained on, in nats per token.
        consistency: divergence of each, in nats per token; none with one draw.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, two_draws: bool = False) -> None:
        super().__init__()
        self.model, self.dtype, self.two_draws = model, dtype, two_draws
        self.losses: list[Tensor] = []
        self.consistency: list[Tensor] = []

    def forward(self, batch: Tensor, labels: Tensor | None = None) -> Any:
        """Return an object with ``logits``, or with ``loss`` if labels are given.

        Args:
            batch: int64 ``[batch, T]``.
            labels: the same again, to train.
        """
        with computing_in(self.dtype, batch.device):
            out = self.model(batch, labels=labels, use_cache=False)
            if labels is None:
                return out
            loss: Tensor = out.loss
            self.losses.append(loss.detach())
            if self.two_draws:
                other = self.model(batch, use_cache=False).logits
                divergence = consistency_loss(out.logits, other)
                self.consistency.append(divergence.detach())
                loss = loss + divergence
        return SimpleNamespace(loss=loss)
