"""4-bit embeddings and output layers with more tokens or fewer: old rows keep their bytes."""

import pytest
import torch
from architectures import logits, make

import nf4
from nf4.codebook import nf4_levels
from nf4.functional import scales_of
from nf4.integrations.transformers import NF4Config
from nf4.layers.resizing import resized

SIZES = [(96, 130, 64), (96, 33, 64), (7, 20, 34), (300, 900, 128), (5, 6, 32), (4, 4, 64)]
CASES = [
    (n, m, k, block, double)
    for n, m, k in (
        (96, 130, 64),
        (96, 33, 64),
        (7, 20, 34),
        (300, 900, 128),
        (5, 6, 32),
        (4, 4, 64),
    )
    for block in (32, 64, 256)
    for double in (True, False)
]


@pytest.mark.parametrize(("n", "m", "k", "block", "double"), CASES)
def test_old_rows_keep_their_bytes_and_new_ones_their_error(n, m, k, block, double) -> None:
    of = torch.Generator().manual_seed(n * m)
    q = nf4.quantize(torch.randn(n, k, generator=of), block, double)
    new = torch.randn(m, k, generator=of)
    found = resized(q, new)
    rows = min(n, m)
    assert found.shape == (m, k)
    nf4.functional.check_nf4(found)
    assert torch.equal(found.packed.view(-1)[: rows * k // 2], q.packed.view(-1)[: rows * k // 2])
    blocks = -(-rows * k // block)
    assert torch.equal(found.absmax[:blocks], q.absmax[:blocks])
    assert torch.equal(nf4.dequantize(found)[:rows], nf4.dequantize(q)[:rows])
    if m <= n:
        return
    # In the last old block, and the last old group of scales, a new element is the nearest level
    # of the scale there; beyond, codes are those of quantizing the new rows alone
    group = 256 * block
    forced = min(-(n * k) % (group if double else block), (m - n) * k)
    values, scales = nf4.dequantize(found).view(-1), scales_of(found).repeat_interleave(block)
    here = slice(n * k, n * k + forced)
    best = (new.view(-1)[here, None] - scales[here, None] * nf4_levels("cpu")).abs().amin(1)
    distance = (values[here] - new.view(-1)[here]).abs()
    torch.testing.assert_close(distance, best, rtol=0, atol=1e-6)
    within = -(n * k) % block
    alone = nf4.quantize(new[n:].reshape(-1)[within:], block, False)
    assert torch.equal(
        found.packed.view(-1)[(n * k + forced) // 2 :], alone.packed[(forced - within) // 2 :]
    )


def test_what_does_not_fit_is_refused() -> None:
    q = nf4.quantize(torch.randn(8, 64))
    with pytest.raises(ValueError, match=r"expected \[M, K\] for a matrix \[N, K\]"):
        resized(q, torch.randn(9, 32))
    with pytest.raises(ValueError, match="expected finite values in new rows"):
        resized(q, torch.full((9, 64), torch.nan))


MODELS = {
    "Llama": {"skip_modules": ()},
    "Gemma": {"skip_modules": (), "quantize_embeddings": True},
    "GPT-2": {"skip_modules": (), "quantize_embeddings": True},
    "T5": {"skip_modules": ("wo",), "quantize_embeddings": True},
}


@pytest.mark.parametrize("size", [120, 64])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_resizes_and_computes_old_tokens_as_before(name, size, tmp_path) -> None:
    model = nf4.quantize_model(make(name), **MODELS[name])
    before = logits(model, name)
    embedding = model.get_input_embeddings()
    old = nf4.dequantize(embedding.weight) if "quantize_embeddings" in MODELS[name] else None
    head = nf4.dequantize(model.get_output_embeddings().weight)
    model.resize_token_embeddings(size)
    rows = min(size, 96)
    if old is not None:
        found = model.get_input_embeddings()
        assert isinstance(found, nf4.EmbeddingNF4) and found.num_embeddings == size
        assert torch.equal(nf4.dequantize(found.weight)[:rows], old[:rows])
    found = model.get_output_embeddings()
    assert type(found) is nf4.LinearNF4 and found.out_features == size
    assert torch.equal(nf4.dequantize(found.weight)[:rows], head[:rows])
    assert model.config.get_text_config().vocab_size == size
    torch.testing.assert_close(logits(model, name)[..., :rows], before[..., :rows])
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again, name), logits(model, name))


def test_one_that_was_loaded_resizes_and_trains(tiny_llama, tmp_path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    kind = type(tiny_llama())
    model = kind.from_pretrained(
        tmp_path / "dense", quantization_config=NF4Config(quantize_embeddings=True)
    )
    tokens = model.config.vocab_size
    model.resize_token_embeddings(pad_to_multiple_of=128, new_num_tokens=tokens + 3)
    assert model.get_output_embeddings().packed is model.get_input_embeddings().packed
    nf4.add_lora(model, r=2)
    model(torch.tensor([[tokens + 2, 1]]), labels=torch.tensor([[1, tokens + 2]])).loss.backward()
    with pytest.raises(ValueError, match="without adapters, got a QLoRALinear; resize before"):
        model.resize_token_embeddings(tokens)


def test_an_interrupted_resize_leaves_the_model(monkeypatch) -> None:
    model = nf4.quantize_model(make("Gemma"), (), quantize_embeddings=True)
    modules = dict(model.named_modules(remove_duplicate=False))
    ties = dict(model.all_tied_weights_keys)
    monkeypatch.setattr(type(model), "tie_weights", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.resize_token_embeddings(120)
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    assert model.all_tied_weights_keys == ties


def test_hooks_stay_and_what_cannot_be_resized_changes_nothing() -> None:
    model = nf4.quantize_model(make("Llama"), (), quantize_embeddings=True)
    model.enable_input_require_grads()
    model.resize_token_embeddings(104)
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad
    odd = nf4.quantize_model(make("GPT-2", n_embd=33, n_head=3), (), quantize_embeddings=True)
    with pytest.raises(ValueError, match="an even number of columns, got transformer.wte"):
        odd.resize_token_embeddings(104)
    assert odd.config.vocab_size == odd.get_input_embeddings().num_embeddings == 96
