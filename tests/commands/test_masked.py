"""Masked language models on a 4-bit base: masks, padding, training of adapters, predictions."""

import math
import re
from dataclasses import replace

import pytest
import torch
from helpers import error
from torch import nn
from transformers import AutoTokenizer

import nf4
from nf4.commands.demo import masked
from nf4.commands.demo.masked import IGNORED, Guess, Vocabulary
from nf4.models.quantize import quantized_layers
from nf4.tools.sources import model_path

LAYERS = 2
BYTES = masked.byte_vocabulary()


def hard_reactions() -> masked.Task:
    """ALBERT and four reactions of which it gets 92 % right: of others there is less to learn."""
    task = masked.albert_task()
    return replace(task, sequences=[task.sequences[i] for i in (4, 8, 10, 11)])


def few_letters() -> masked.Task:
    """The random BERT and a text of three bytes, of which it can get one in three right."""
    task = masked.random_bert_task(LAYERS)
    return replace(task, sequences=[BYTES.encode(n * "no " + "no") for n in (7, 8, 11)])


# name: how it is made, quantized layers, of these output projections of attention
TASKS = {
    "albert": (hard_reactions, 8, 1),
    "minilm": (lambda: masked.minilm_task(count=4, length=16), 37, 6),
    "random_bert": (few_letters, 6 * LAYERS + 1, LAYERS),
}
STEPS = {"albert": 12, "minilm": 16, "random_bert": 8}


@pytest.fixture(params=TASKS)
def task(request) -> masked.Task:
    return TASKS[request.param][0]()


@pytest.fixture
def bert() -> masked.Task:
    return masked.random_bert_task(1, count=4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_of(model: nn.Module, batch: masked.Batch) -> float:
    with torch.no_grad():
        return masked.masked_loss(model, batch).item()


@pytest.mark.parametrize("count", [1, 2, 3, 10, 47, 500])
def test_masking_chooses_15_percent(count) -> None:
    """To the nearest token, so that it is off by half a token at most; but never none."""
    text = bytes(i % 256 for i in range(count)).decode("latin-1")
    ids = torch.tensor([*BYTES.encode(text), *[BYTES.ids["[PAD]"]] * 5])
    others = int((~BYTES.special[ids]).sum())
    before = ids.clone()
    covered, labels = masked.mask_tokens(ids, BYTES, generator())
    chosen = labels != IGNORED
    assert abs(chosen.sum() - 0.15 * others) <= 0.5 or (chosen.sum() == 1 and others < 4)
    assert covered.shape == labels.shape == ids.shape and torch.equal(ids, before)
    assert not BYTES.special[ids[chosen]].any()
    assert torch.equal(labels[chosen], ids[chosen]) and (labels[~chosen] == IGNORED).all()
    assert torch.equal(covered[~chosen], ids[~chosen])


def test_masking_reaches_every_token_and_differs_by_seed() -> None:
    ids = torch.tensor(BYTES.encode("abcdefghij"))
    chosen = [masked.mask_tokens(ids, BYTES, generator(i))[1] != IGNORED for i in range(99)]
    assert torch.equal(torch.stack(chosen).any(0), ~BYTES.special[ids])
    assert torch.equal(chosen[5], masked.mask_tokens(ids, BYTES, generator(5))[1] != IGNORED)


def test_masking_covers_80_replaces_10_and_keeps_10_percent() -> None:
    """Counts of independent draws: within five standard deviations, sqrt(n p (1 - p)) each.

    A token drawn at random is the one that was there once in 256 times, and looks kept.
    """
    ids = torch.tensor(BYTES.encode("A fellow almost damned in a fair wife. " * 1500))
    covered, labels = masked.mask_tokens(ids, BYTES, generator())
    found, expected = covered[labels != IGNORED], labels[labels != IGNORED]
    n, mask = len(found), found == BYTES.ids["[MASK]"]
    other = ~mask & (found != expected)
    assert n > 8000
    for count, p in ((mask, 0.8), (other, 0.1 * 255 / 256), (found == expected, 0.1 + 0.1 / 256)):
        assert abs(count.sum() - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert not BYTES.special[found[other]].any()
    # 800 draws of 256 bytes leave out 256 (255 / 256)^800 = 11 on average
    assert len(found[other].unique()) > 220


@pytest.mark.parametrize("share", range(3), ids=["mask", "random", "keep"])
def test_masking_by_other_shares(share) -> None:
    ids = torch.tensor(BYTES.encode("Put out the light, and then put out the light: " * 20))
    shares = tuple(float(i == share) for i in range(3))
    covered, labels = masked.mask_tokens(ids, BYTES, generator(), shares)
    chosen = labels != IGNORED
    same = (covered[chosen] == ids[chosen]).float().mean()
    of_mask = (covered[chosen] == BYTES.ids["[MASK]"]).float().mean()
    assert of_mask == (share == 0)
    assert same == 1 if share == 2 else same < 0.1  # of 140 draws, 1 in 256 is the same


def test_batch_pads_masks_and_labels() -> None:
    sequences = [BYTES.encode(text) for text in ("Iago", "O, Sir, content you.", "Othello")]
    short = masked.make_batch(sequences, BYTES, generator())
    long = masked.make_batch(sequences, BYTES, generator(), length=30)
    assert {k: tuple(v.shape) for k, v in short.items()} == dict.fromkeys(short, (3, 22))
    assert all(part.shape == (3, 30) and part.dtype == torch.int64 for part in long.values())
    for name, part in long.items():
        assert torch.equal(part[:, :22], short[name]), name
    for i, sequence in enumerate(sequences):
        n = len(sequence)
        assert long["attention_mask"][i].tolist() == [1] * n + [0] * (30 - n)
        assert (long["input_ids"][i, n:] == BYTES.ids["[PAD]"]).all()
        assert (long["labels"][i, n:] == IGNORED).all()
        back = torch.where(long["labels"][i] == IGNORED, long["input_ids"][i], long["labels"][i])
        assert back[:n].tolist() == sequence


def test_batches_are_drawn_and_masked_anew(bert) -> None:
    batches = masked.draw_batches(bert, 20, batch_size=2, seed=3)
    again = masked.draw_batches(bert, 20, batch_size=2, seed=3)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(batches, again, strict=True) for k in a)
    assert len({str(batch["labels"].tolist()) for batch in batches}) == 20
    lengths = {tuple(batch["attention_mask"].sum(1).tolist()) for batch in batches}
    known = {len(sequence) for sequence in bert.sequences}
    assert len(known) == 4 and {n for pair in lengths for n in pair} == known
    assert all(a != b for a, b in lengths)  # no sequence twice in a batch


def test_padding_does_not_change_the_loss(task) -> None:
    """But for rounding: other shapes are summed in another order, and fp32 has 2^-24 = 6e-8."""
    sequences = task.sequences[:3]
    model = nf4.quantize_model(task.model, skip_modules=task.skip_modules)
    short, long = (
        masked.make_batch(sequences, task.vocabulary, generator(), length=length)
        for length in (None, max(map(len, sequences)) + 9)
    )
    loss = loss_of(model, short)
    assert loss_of(model, long) == pytest.approx(loss, rel=1e-5)
    seen = {**long, "attention_mask": torch.ones_like(long["attention_mask"])}
    assert abs(loss_of(model, seen) / loss - 1) > 1e-4


def test_loss_is_that_of_transformers(task) -> None:
    batch = masked.make_batch(task.sequences[:4], task.vocabulary, generator())
    with torch.no_grad():
        theirs = task.model(**batch).loss.item()
    assert loss_of(task.model, batch) == pytest.approx(theirs, rel=1e-5)  # rounding, as above


@pytest.mark.parametrize(
    "change",
    [lambda y: y[:, :-1], lambda y: y[:-1], lambda y: y.flatten(), lambda y: y.mT],
    ids=["shorter", "fewer", "flat", "transposed"],
)
def test_labels_of_another_shape_raise(change, bert) -> None:
    """The last two have as many elements as the input; to transformers they look right."""
    batch = masked.make_batch(bert.sequences, BYTES, generator())
    wrong = {**batch, "labels": change(batch["labels"])}
    message = re.escape(f"labels: expected shape {tuple(batch['labels'].shape)}")
    for call in (masked.masked_loss, lambda m, b: masked.predict(m, b, BYTES)):
        with pytest.raises(ValueError, match=message):
            call(bert.model, wrong)
    with pytest.raises(ValueError, match=message):
        masked.train(bert.model, [wrong], 1e-3)


@pytest.mark.parametrize("target", ["attention_output", "all-linear"])
@pytest.mark.parametrize("name", TASKS)
def test_training_lowers_the_loss_and_changes_adapters_only(name, target) -> None:
    make, layers, outputs = TASKS[name]
    task = make()
    model = nf4.quantize_model(task.model, skip_modules=task.skip_modules)
    assert len(quantized_layers(model)) == layers
    names = [task.attention_output] if target == "attention_output" else target
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = masked.evaluation_batch(task)
    guesses = masked.predict(model, batch, task.vocabulary)

    nf4.add_lora(model, r=64, lora_alpha=64, target_modules=names)
    adapted = [m for m in model.modules() if isinstance(m, nf4.QLoRALinear)]
    assert len(adapted) == (outputs if target == "attention_output" else layers)
    assert {m.r for m in adapted} == {64}
    assert masked.predict(model.eval(), batch, task.vocabulary) == guesses  # adapters add zero
    if name == "random_bert" and target == "attention_output":
        assert {(m.in_features, m.out_features) for m in adapted} == {(768, 768)}

    seen = []
    batches = masked.draw_batches(task, STEPS[name])
    losses = masked.train(model, batches, 2e-3, lambda *step: seen.append(step))
    assert seen == list(enumerate(losses, 1)) and not model.training
    after = model.state_dict()
    adapters = {key for key in after if "lora_" in key}
    assert len(adapters) == 2 * len(adapted) and adapters == after.keys() - before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(m.lora_B.abs().max() > 0 for m in adapted)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    again = masked.predict(model, batch, task.vocabulary)
    assert sum(g.loss for g in again) < 0.7 * sum(g.loss for g in guesses)
    assert masked.accuracy(again) > masked.accuracy(guesses)


def test_replaced_layer_equals_the_dense_one_up_to_quantization(bert) -> None:
    dense = bert.model.bert.encoder.layer[0].attention.output.dense
    layer = nf4.QLoRALinear.from_linear(dense, r=64, lora_alpha=64)
    assert (layer.in_features, layer.out_features, layer.r) == (768, 768, 64)
    x = torch.randn(50, 768)
    with torch.no_grad():
        expected = dense(x)
        difference = layer(x).double() - expected.double()
        weight = dense.weight.double()
        lost = error(nf4.QLoRALinear(768, 768, r=64, lora_alpha=64)(x), expected)
    rounded = nf4.dequantize(layer.weight, torch.float32).double() - weight
    # Beside quantization there is only the rounding of two sums of 768 products to fp32
    assert (difference - x.double() @ rounded.T).norm() < 1e-5 * expected.norm()
    # The rounding of a weight does not depend on x: what it does to the output is what it is
    of_weight = (rounded.norm() / weight.norm()).item()
    assert (difference.norm() / expected.norm()).item() == pytest.approx(of_weight, rel=0.05)
    assert of_weight < 0.1 and lost > 1  # a layer that is made anew has weights of its own


def test_predictions_are_the_most_probable_tokens(task) -> None:
    batch = masked.evaluation_batch(task)
    guesses = masked.predict(task.model, batch, task.vocabulary, k=5)
    with torch.no_grad():
        logits = task.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert len(guesses) == (batch["labels"] != IGNORED).sum()
    mean = sum(guess.loss for guess in guesses) / len(guesses)
    assert mean == pytest.approx(loss_of(task.model, batch), rel=1e-5)
    for guess in guesses:
        label = int(batch["labels"][guess.row, guess.position])
        assert label != IGNORED and guess.expected == task.vocabulary.tokens[label]
        probabilities = logits[guess.row, guess.position].softmax(-1)
        assert math.exp(-guess.loss) == pytest.approx(probabilities[label].item(), rel=1e-3)
        assert list(guess.probabilities) == sorted(guess.probabilities, reverse=True)
        ids = [task.vocabulary.ids[token] for token in guess.tokens]
        found = torch.tensor(guess.probabilities)
        torch.testing.assert_close(probabilities[ids], found, rtol=1e-3, atol=1e-6)
        rest = probabilities.clone().index_fill_(0, torch.tensor(ids), 0)
        assert rest.max() <= found.min() * 1.001


def test_accuracy_counts_the_best_token() -> None:
    guesses = [Guess(0, 1, "a", 0.5, (best, "a"), (0.6, 0.4)) for best in ("a", "b", "c", "a", "b")]
    assert masked.accuracy(guesses) == pytest.approx(0.4)


def test_evaluation_hides_what_it_asks_for(bert) -> None:
    first, second = masked.evaluation_batch(bert), masked.evaluation_batch(bert)
    assert all(torch.equal(first[key], second[key]) for key in first)
    asked = first["labels"] != IGNORED
    assert (first["input_ids"][asked] == BYTES.ids["[MASK]"]).all()
    assert len(first["input_ids"]) == 2 * len(bert.sequences)


def test_albert_knows_the_reactions() -> None:
    """It was trained on a million others; with tokens cut otherwise it would know none."""
    task = masked.albert_task()
    guesses = masked.predict(task.model, masked.evaluation_batch(task), task.vocabulary)
    assert masked.accuracy(guesses) > 0.85


def test_smiles_are_cut_into_atoms_and_bonds() -> None:
    vocabulary = masked.albert_task().vocabulary
    text = "CC(Cl)[C@@H](Br)c%12.[Na+]>>C#N"
    tokens = ["C", "C", "(", "Cl", ")", "[C@@H]", "(", "Br", ")", "c", "%12", "."]
    names = [vocabulary.tokens[i] for i in vocabulary.encode(text)]
    assert names == ["[CLS]", *tokens, "[Na+]", ">>", "C", "#", "N", "[SEP]"]
    for reaction in masked.REACTIONS:
        names = [vocabulary.tokens[i] for i in vocabulary.encode(reaction)]
        assert "".join(names[1:-1]) == reaction and names.count(">>") == 1
    assert [vocabulary.tokens[i] for i in vocabulary.encode("C[Xx]")][2] == "[UNK]"


def test_minilm_has_its_own_tokenizer() -> None:
    vocabulary, text = masked.minilm_task(count=1).vocabulary, "Rain fell on the [MASK], naïvely."
    assert (
        vocabulary.encode(text)
        == AutoTokenizer.from_pretrained(model_path("minilm"))(text).input_ids
    )
    special = {t for t, s in zip(vocabulary.tokens, vocabulary.special, strict=True) if s}
    assert len(special) == 5 + 994 and "[unused993]" in special and "[" not in special


def test_bytes_know_every_text() -> None:
    ids = BYTES.encode("Zoë, 💡\n")
    assert bytes(i - 5 for i in ids[1:-1]).decode() == "Zoë, 💡\n"
    assert len(BYTES.tokens) == 261 and int(BYTES.special.sum()) == 5


def test_random_bert_has_the_shape_of_bert_base() -> None:
    config = masked.random_bert_task(1).model.config
    found = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert found == (768, 12, 3072)


def test_models_are_the_same_in_every_call_and_leave_the_random_numbers() -> None:
    for make in (lambda: masked.minilm_task(2), lambda: masked.random_bert_task(1)):
        made = []
        for seed in range(2):
            state = torch.manual_seed(seed).get_state()
            made.append(make())
            assert torch.equal(torch.get_rng_state(), state)
        first, second = (task.model.state_dict() for task in made)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert made[0].sequences == made[1].sequences


IDS = torch.tensor(BYTES.encode("Desdemona"))
BATCH = masked.make_batch([BYTES.encode("Desdemona")], BYTES, generator())
UNLABELLED = {**BATCH, "labels": torch.full_like(BATCH["labels"], IGNORED)}


@pytest.mark.parametrize(
    ("call", "raised", "message"),
    [
        (lambda t: Vocabulary(["[PAD]", "a"], list), ValueError, "tokens: .* no \\[UNK\\]"),
        (lambda t: Vocabulary([*BYTES.tokens, "a"], list), ValueError, "tokens: .* got 1 more"),
        (lambda t: masked.mask_tokens([1], BYTES, generator()), TypeError, "ids: .* got list"),
        (lambda t: masked.mask_tokens(IDS.int(), BYTES, generator()), TypeError, "ids: .*int32"),
        (lambda t: masked.mask_tokens(IDS[None], BYTES, generator()), ValueError, "ids: .*shape"),
        (lambda t: masked.mask_tokens(IDS + 250, BYTES, generator()), ValueError, "0 to 260, got"),
        (lambda t: masked.mask_tokens(IDS[:1], BYTES, generator()), ValueError, "not special"),
        (
            lambda t: masked.mask_tokens(IDS, BYTES, generator(), (0.8, 0.1, 0.2)),
            ValueError,
            "shares: .*0.2",
        ),
        (
            lambda t: masked.mask_tokens(IDS, BYTES, generator(), (1.1, -0.1, 0)),
            ValueError,
            "shares: .*-0.1",
        ),
        (lambda t: masked.make_batch([], BYTES, generator()), ValueError, "sequences: "),
        (
            lambda t: masked.make_batch([IDS.tolist()], BYTES, generator(), length=10),
            ValueError,
            "length: .*at least 11, got 10",
        ),
        (
            lambda t: masked.make_batch([IDS.tolist()], BYTES, generator(), length=20.0),
            TypeError,
            "length: .*float",
        ),
        (lambda t: masked.draw_batches(t, 0), ValueError, "count: .*got 0"),
        (lambda t: masked.draw_batches(t, True), TypeError, "count: .*bool"),
        (lambda t: masked.draw_batches(t, 1, 5), ValueError, "batch_size: .*1 to 4, got 5"),
        (lambda t: masked.masked_loss(t.model, UNLABELLED), ValueError, "labels: .*-100"),
        (lambda t: masked.masked_loss(t.model.bert, BATCH), TypeError, "model: .*BertModel"),
        (lambda t: masked.masked_loss(nn.Linear(2, 2), BATCH), TypeError, "model: .*Linear"),
        (lambda t: masked.train(t.model, [], 1e-3), ValueError, "batches: "),
        (lambda t: masked.train(t.model, [BATCH], 0), ValueError, "lr: .*got 0"),
        (lambda t: masked.train(t.model, [BATCH], math.nan), ValueError, "lr: .*got nan"),
        (
            lambda t: masked.train(t.model.requires_grad_(False), [BATCH], 1e-3),
            ValueError,
            "model: .*add_lora",
        ),
        (lambda t: masked.predict(t.model, BATCH, BYTES, 0), ValueError, "k: .*1 to 261, got 0"),
        (lambda t: masked.predict(t.model, BATCH, BYTES, "3"), TypeError, "k: .*str"),
        (lambda t: masked.predict(t.model.train(), BATCH, BYTES), ValueError, "model: .*eval"),
        (lambda t: masked.accuracy([]), ValueError, "guesses: "),
        (lambda t: masked.minilm_task(0), ValueError, "count: "),
        (lambda t: masked.minilm_task(1, 2), ValueError, "length: .*3 to 512, got 2"),
        (lambda t: masked.random_bert_task(0), ValueError, "layers: .*got 0"),
        (lambda t: masked.random_bert_task(1.5), TypeError, "layers: .*float"),
    ],
)
def test_rejects_bad_arguments(call, raised, message, bert) -> None:
    before = {key: value.clone() for key, value in bert.model.state_dict().items()}
    with pytest.raises(raised, match=message):
        call(bert)
    after = bert.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
