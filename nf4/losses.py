"""The losses that T-Few and AdaMix train adapters with. They know tensors only, no model.

T-Few (Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.2) trains on questions with
choices. Of an example with the choices y, y being T tokens, it adds up three terms:

    L_LM = -1/T sum_t log p(y_t)                            y the correct choice
    L_UL = -sum_n sum_t log(1 - p(y_t^n)) / sum_n T^n       y^n the incorrect ones       (1)
    L_LN = -log softmax(beta)[correct]                      beta = 1/T sum_t log p(y_t)  (2)

AdaMix (Wang et al. 2022, https://arxiv.org/abs/2205.12410, section 3.2) keeps two passes through
modules drawn at random alike, by half of KL(a || b) + KL(b || a).

All are in nats, computed in fp32, in float64 of float64 logits, and returned as a scalar of that
dtype. Logits at positions that do not count may be anything, NaN too, and get a gradient of zero.
What the values of labels and correct must be is checked on CPU tensors alone, and not while a
graph is traced: anywhere else the check would wait for the device.
"""

import math

import torch
from torch import Tensor

# Log of what is added to the sum of the other tokens' probabilities: without it log(1 - p) is -inf
# where no other token is possible. It changes nothing else, as two float16 logits are at most
# 2 * 65504 apart; and it leaves such a token no gradient: p stays 1 whatever its logit is.
FLOOR = -(2.0**17)
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def t_few_loss(logits: Tensor, labels: Tensor, correct: Tensor, ignore_index: int = -100) -> Tensor:
    """Return T-Few's loss of a batch of questions with choices: the sum of its three terms.

    The logits of position t must be those for the label of position t. An encoder-decoder's are.
    A causal model's are for the next token: run it on prompt and choice, with labels that are
    ignore_index in the prompt, and pass ``logits[..., :-1, :]`` and ``labels[..., 1:]``.

    Each term is the mean over examples of the term of the example, so that an example counts the
    same however long its choices are. A choice that an example does not have is a row of
    labels that are all ignore_index.

    Args:
        logits: float32, float16, bfloat16 or float64 ``[batch, choices, length, vocabulary]``.
        labels: int64 ``[batch, choices, length]``, tokens of the choices; ignore_index at
            positions that do not count, padding and prompt.
        correct: int64 ``[batch]``, which choice is the right one.
        ignore_index: the label that does not count.

    Returns:
        A scalar, in nats.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: shapes or devices do not fit, or a dimension is 0; on a CPU also: a label is no
            token of the vocabulary, or correct is out of range or at a choice without a token.
            Elsewhere such a choice makes the loss infinite.
    """
    scores, log_p, index, counted = _scores(logits, labels, correct, ignore_index)
    terms = _language_model(scores, correct) + _length_normalized(scores, correct)
    return (terms + _unlikelihood(log_p, index, counted, correct)).mean()


def language_model_loss(
    logits: Tensor, labels: Tensor, correct: Tensor, ignore_index: int = -100
) -> Tensor:
    """Return the mean cross-entropy of the correct choice's tokens, L_LM of section 3.2.

    Arguments, averaging over examples and errors are those of `t_few_loss`.
    """
    scores, *_ = _scores(logits, labels, correct, ignore_index)
    return _language_model(scores, correct).mean()


def unlikelihood_loss(
    logits: Tensor, labels: Tensor, correct: Tensor, ignore_index: int = -100
) -> Tensor:
    """Return the mean of -log(1 - p) over the incorrect choices' tokens, L_UL of equation 1.

    An example with a single choice has no such token: its term is 0, and counts in the mean over
    examples. log(1 - p) is the logarithm of the sum of all other probabilities, right to rounding
    however near p is to 1, with a gradient of at most 1 for each logit.

    Arguments, averaging over examples and errors are those of `t_few_loss`.
    """
    _, log_p, index, counted = _scores(logits, labels, correct, ignore_index)
    return _unlikelihood(log_p, index, counted, correct).mean()


def length_normalized_loss(
    logits: Tensor, labels: Tensor, correct: Tensor, ignore_index: int = -100
) -> Tensor:
    """Return the cross-entropy over choices of their mean log p of a token, L_LN of equation 2.

    The term of an example with a single choice is 0, and counts in the mean over examples.

    Arguments, averaging over examples and errors are those of `t_few_loss`.
    """
    scores, *_ = _scores(logits, labels, correct, ignore_index)
    return _length_normalized(scores, correct).mean()


def choice_scores(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Return the mean log p of each choice's tokens: the beta that T-Few ranks choices by.

    Arguments and errors are those of `t_few_loss`.

    Returns:
        float32, or float64 of float64 logits, ``[batch, choices]``: nats per token, -inf for a
        choice without a token.
    """
    return _scores(logits, labels, None, ignore_index)[0]


def _scores(
    logits: Tensor, labels: Tensor, correct: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check the arguments, and return what every term is made of.

    Returns:
        The scores of `choice_scores`; log-probabilities, shaped like logits; the tokens to take
        of them, int64 ``[batch, choices, length, 1]``; which positions count, bool
        ``[batch, choices, length]``.
    """
    _check_choices(logits, labels, correct, ignore_index)
    counted = labels != ignore_index
    index = labels.where(counted, 0)[..., None]
    log_p = _log_softmax(logits, counted)
    length = counted.sum(dim=-1)
    total = log_p.gather(-1, index)[..., 0].where(counted, 0).sum(dim=-1)
    scores = (total / length.clamp(min=1)).where(length > 0, -torch.inf)
    return scores, log_p, index, counted


def _language_model(scores: Tensor, correct: Tensor) -> Tensor:
    return -scores.gather(1, correct[:, None])[:, 0]


def _length_normalized(scores: Tensor, correct: Tensor) -> Tensor:
    return scores.logsumexp(dim=1) - scores.gather(1, correct[:, None])[:, 0]


def _unlikelihood(log_p: Tensor, index: Tensor, counted: Tensor, correct: Tensor) -> Tensor:
    choices = torch.arange(counted.shape[1], device=counted.device)
    counted = counted & (choices != correct[:, None])[..., None]
    log_of_others = log_p.scatter(-1, index, FLOOR).logsumexp(dim=-1)
    total = log_of_others.where(counted, 0).sum(dim=(1, 2))
    return -total / counted.sum(dim=(1, 2)).clamp(min=1)


def consistency_loss(
    logits_a: Tensor, logits_b: Tensor, labels: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Return how far two passes are from each other: half of KL(a || b) + KL(b || a), in nats.

    AdaMix adds it to the loss of the task (section 3.2), a and b being two passes of one batch
    through modules drawn anew. Gradients go to both. A token whose logits are both -inf adds
    nothing; one that a single pass rules out makes the loss infinite.

    Args:
        logits_a: float32, float16, bfloat16 or float64 ``[..., vocabulary]``.
        logits_b: the same shape, dtype and device.
        labels: int64 ``[...]``: positions where it is ignore_index do not count, other values do
            not matter; None if all count. To be shifted for a causal model as in `t_few_loss`.
        ignore_index: the label that does not count.

    Returns:
        A scalar, the mean over the positions that count.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: shapes or devices do not fit, or a dimension is 0; on a CPU also: labels leave
            no position that counts. Elsewhere the loss is then 0.
    """
    _check_logits(logits_a, "logits_a")
    _check_logits(logits_b, "logits_b")
    _check_like(logits_b, "logits_b", logits_a.shape, logits_a, "logits_a", logits_a.dtype)
    if labels is None:
        counted = torch.ones(logits_a.shape[:-1], dtype=torch.bool, device=logits_a.device)
    else:
        _check_like(labels, "labels", logits_a.shape[:-1], logits_a, "logits_a", torch.int64)
        _check_ignore_index(ignore_index)
        counted = labels != ignore_index
        if _may_look(labels) and not counted.any():
            raise ValueError(f"labels: expected some that are not {ignore_index}, got none")
    log_a, log_b = _log_softmax(logits_a, counted), _log_softmax(logits_b, counted)
    # KL(a || b) + KL(b || a) = sum (p_a - p_b) (log p_a - log p_b), whose terms are never negative
    impossible = log_a.isneginf() & log_b.isneginf()
    apart = log_a.masked_fill(impossible, 0) - log_b.masked_fill(impossible, 0)
    terms = (log_a.exp() - log_b.exp()) * apart
    # Also where the other one's probability has underflowed, and 0 * inf is no infinity
    terms = terms.masked_fill(log_a.isneginf() ^ log_b.isneginf(), math.inf)
    divergence = 0.5 * terms.sum(dim=-1)
    return divergence.sum() / counted.sum().clamp(min=1)


def _log_softmax(logits: Tensor, counted: Tensor) -> Tensor:
    """Return log-probabilities in fp32 or float64; equal ones where a position does not count."""
    # Before the softmax: its gradient multiplies by the probabilities, and 0 * NaN is no zero
    wide = logits.where(counted[..., None], 0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return wide.log_softmax(dim=-1, dtype=dtype)


def _may_look(tensor: Tensor) -> bool:
    """Return whether a tensor has values, and to read them makes nobody wait."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    plain = torch._C._functorch.peek_interpreter_stack() is None  # values under vmap are many
    return plain and not torch._C._len_torch_dispatch_stack()


def _check_choices(
    logits: Tensor, labels: Tensor, correct: Tensor | None, ignore_index: int
) -> None:
    _check_logits(logits, "logits")
    if logits.ndim != 4:
        raise ValueError(
            "logits: expected shape (batch, choices, length, vocabulary), "
            f"got {tuple(logits.shape)}"
        )
    _check_like(labels, "labels", logits.shape[:-1], logits, "logits", torch.int64)
    _check_ignore_index(ignore_index)
    if correct is not None:
        _check_like(correct, "correct", logits.shape[:1], logits, "logits", torch.int64)
    if _may_look(labels):
        _check_values(labels, correct, ignore_index, logits.shape[-1])


def _check_values(
    labels: Tensor, correct: Tensor | None, ignore_index: int, vocabulary: int
) -> None:
    counted = labels != ignore_index
    wrong = labels[counted & ((labels < 0) | (labels >= vocabulary))]
    if len(wrong):
        raise ValueError(
            f"labels: expected tokens from 0 to {vocabulary - 1} or {ignore_index}, "
            f"got {wrong[0].item()}"
        )
    if correct is None:
        return
    choices = labels.shape[1]
    for example, choice in enumerate(correct.tolist()):
        if not 0 <= choice < choices:
            raise ValueError(
                f"correct: expected choices from 0 to {choices - 1}, got {choice} "
                f"for example {example}"
            )
        if not counted[example, choice].any():
            raise ValueError(
                f"correct: expected choices with tokens, got {choice} for example {example}, "
                f"whose labels are all {ignore_index}"
            )


def _check_logits(logits: Tensor, name: str) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in _FLOATING:
        kinds = ", ".join(str(dtype)[6:] for dtype in _FLOATING)
        raise TypeError(f"{name}: expected one of {kinds}, got {logits.dtype}")
    if logits.ndim == 0 or 0 in logits.shape:
        raise ValueError(f"{name}: expected values to count, got shape {tuple(logits.shape)}")


def _check_like(
    tensor: Tensor, name: str, shape: torch.Size, like: Tensor, whose: str, dtype: torch.dtype
) -> None:
    """Raise unless a tensor has a shape and a dtype, and the device of another."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} for {whose} {tuple(like.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} like {whose}, got {tensor.device}")


def _check_ignore_index(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
