"""EmbeddingNF4, nf4.embedding, and what is tied to embeddings."""

import copy
import pickle

import pytest
import torch
from helpers import error
from torch import nn

import nf4

TOKENS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(50, 64), (20, 128), (33, 33), (70, 48), (300, 100)])
def test_embedding_is_rows_of_the_dequantized_matrix(shape, block_size, dtype, double_quant):
    q = nf4.quantize(torch.randn(shape).to(dtype), block_size, double_quant)
    rows = torch.randint(shape[0], (3, 5))
    assert torch.equal(nf4.embedding(rows, q), nf4.dequantize(q)[rows])
    rows = rows.int().T
    fp32 = nf4.embedding(rows, q, torch.float32)
    assert torch.equal(fp32, nf4.dequantize(q, torch.float32)[rows.long()])


def test_embedding_of_no_rows_is_empty() -> None:
    for k in (64, 33):
        q = nf4.quantize(torch.randn(9, k))
        assert nf4.embedding(torch.zeros(2, 0, dtype=torch.int64), q).shape == (2, 0, k)


BAD_ROWS = {
    "float": (torch.zeros(2), TypeError, "input: expected an int32 or int64 tensor, got torch.fl"),
    "list": ([1], TypeError, "input: expected an int32 or int64 tensor, got list"),
    "negative": (torch.tensor([-1]), IndexError, "out of range"),
    "too_large": (torch.tensor([33]), IndexError, "out of range"),
}


@pytest.mark.parametrize("columns", [64, 33])
@pytest.mark.parametrize(("rows", "kind", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_embedding_refuses_bad_rows(rows, kind, message, columns) -> None:
    with pytest.raises(kind, match=message):
        nf4.embedding(rows, nf4.quantize(torch.randn(33, columns)))


def test_embedding_refuses_what_is_no_matrix_in_rows() -> None:
    rows = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected a quantized matrix in rows, got \(64,\)"):
        nf4.embedding(rows, nf4.quantize(torch.randn(64)))
    with pytest.raises(ValueError, match="expected a quantized matrix in rows.*fragments"):
        nf4.embedding(rows, nf4.to_fragments(nf4.quantize(torch.randn(16, 64))))


def test_module_is_a_drop_in_for_the_dense_one() -> None:
    dense = nn.Embedding(50, 64, padding_idx=3).eval()
    layer = nf4.EmbeddingNF4.from_embedding(dense)
    assert torch.equal(layer(TOKENS), nf4.dequantize(nf4.quantize(dense.weight))[TOKENS])
    assert (layer(torch.tensor(3)) == 0).all() and layer.padding_idx == 3
    assert not layer.training and not any(p.requires_grad for p in layer.parameters())
    assert "50, 64, block_size=64" in repr(layer)
    back = layer.to_embedding()
    assert torch.equal(back(TOKENS), layer(TOKENS)) and back.padding_idx == 3
    half = copy.deepcopy(layer).bfloat16()
    assert half(TOKENS).dtype == torch.bfloat16
    assert torch.equal(half.packed, layer.packed) and half.absmax2.dtype == torch.float32


def test_module_s_state_goes_back_and_forth() -> None:
    layer = nf4.EmbeddingNF4.from_embedding(nn.Embedding(50, 64))
    other = nf4.EmbeddingNF4.from_embedding(nn.Embedding(50, 64))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(TOKENS), layer(TOKENS))
    other = nf4.EmbeddingNF4.from_embedding(nn.Embedding(50, 64), block_size=128)
    with pytest.raises(RuntimeError, match="absmax: expected torch.uint8"):
        other.load_state_dict(layer.state_dict())


class OwnForward(nn.Embedding):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize(
    "source", [nn.Linear(3, 3), nn.Embedding(9, 3, max_norm=1.0), OwnForward(9, 3)], ids=repr
)
def test_module_refuses_what_is_not_a_plain_embedding(source) -> None:
    with pytest.raises(TypeError, match="source: expected a torch.nn.Embedding"):
        nf4.EmbeddingNF4.from_embedding(source)


def test_module_refuses_a_weight_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"q: expected shape \(9, 64\), got \(8, 64\)"):
        nf4.EmbeddingNF4(nn.Embedding(9, 64), nf4.quantize(torch.randn(8, 64)))


def quantized(tiny_llama, tied: bool, **options) -> nn.Module:
    model = tiny_llama(tie_word_embeddings=tied).eval()
    return nf4.quantize_model(model, skip_modules=(), quantize_embeddings=True, **options)


def test_tied_weight_is_held_once(tiny_llama) -> None:
    model = quantized(tiny_llama, tied=True)
    head, tokens = model.lm_head, model.model.embed_tokens
    assert isinstance(head, nf4.LinearNF4) and isinstance(tokens, nf4.EmbeddingNF4)
    logits = model(TOKENS).logits
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.float()):
        for part in ("packed", "absmax", "absmax2", "offset"):
            assert getattr(twin.lm_head, part) is getattr(twin.model.embed_tokens, part)
        assert torch.equal(twin(TOKENS).logits, logits)
    dense = nf4.merge(copy.deepcopy(model))
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert error(dense(TOKENS).logits, logits) < 1e-5


def test_untied_weights_are_two(tiny_llama) -> None:
    model = quantized(tiny_llama, tied=False)
    assert not torch.equal(model.lm_head.packed, model.model.embed_tokens.packed)
    dense = nf4.merge(model)
    assert dense.lm_head.weight is not dense.model.embed_tokens.weight


def test_embedding_shared_by_a_layer_in_fragments_is_in_rows() -> None:
    dense = nn.Embedding(64, 128)
    linear = nf4.LinearNF4.from_weight(nf4.quantize(dense.weight)).to_fragments()
    layer = nf4.EmbeddingNF4(dense, linear.weight)
    assert (linear.layout, layer.layout) == ("fragments", "rows")
    assert torch.equal(layer(TOKENS), nf4.dequantize(linear.weight)[TOKENS])


def test_adapter_on_a_tied_output_layer_unties_it(tiny_llama) -> None:
    model = nf4.add_lora(quantized(tiny_llama, tied=True), r=2, target_modules=["lm_head"])
    nn.init.normal_(model.lm_head.lora_B)
    logits = model(TOKENS).logits
    dense = nf4.merge(model)
    assert dense.lm_head.weight is not dense.model.embed_tokens.weight
    assert error(dense(TOKENS).logits, logits) < 1e-5


def test_half_of_a_tied_pair_is_refused_before_anything_changes(tiny_llama) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head: expected to quantize it with model.embed_tok"):
        nf4.quantize_model(model, quantize_embeddings=True)
    with pytest.raises(TypeError, match="quantize_embeddings: expected a bool, got int"):
        nf4.quantize_model(model, quantize_embeddings=1)
    assert not any(isinstance(m, nf4.LinearNF4 | nf4.EmbeddingNF4) for m in model.modules())


def test_every_embedding_of_a_plain_model_is_quantized() -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.Embedding(9, 32, max_norm=1))
    nf4.quantize_model(model, quantize_embeddings=True)
    assert [type(m).__name__ for m in model] == ["EmbeddingNF4", "LinearNF4", "Embedding"]
    alone = nf4.quantize_model(nn.Embedding(50, 64), quantize_embeddings=True)
    assert isinstance(alone, nf4.EmbeddingNF4)
    assert isinstance(nf4.merge(alone), nn.Embedding)


def test_trained_adapters_behind_an_embedding_in_4_bits(tiny_llama) -> None:
    model = nf4.add_lora(quantized(tiny_llama, tied=True), r=4)
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.lora_B.grad.abs().max() > 0


def test_to_bitsandbytes_makes_embeddings_dense(tiny_llama) -> None:
    model = quantized(tiny_llama, tied=False)
    found = nf4.to_bitsandbytes(model.state_dict())
    weight = nf4.dequantize(model.model.embed_tokens.weight)
    assert torch.equal(found["model.embed_tokens.weight"], weight)
    assert "lm_head.weight.quant_state.bitsandbytes__nf4" in found


@pytest.mark.parametrize("columns", [64, 33])
def test_operator_passes_opcheck(columns) -> None:
    q = nf4.quantize(torch.randn(33, columns))
    args = (torch.tensor([3, 1]), *(t.detach() for t in q.parts()), columns, 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.nf4.embedding.default, args)


def test_compiled_without_graph_breaks(backend) -> None:
    layer = nf4.EmbeddingNF4.from_embedding(nn.Embedding(50, 64))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert torch.equal(compiled(TOKENS), layer(TOKENS))


def test_embeddings_that_are_skipped_stay_dense_with_what_is_tied_to_them(
    tiny_llama, tmp_path
) -> None:
    from nf4.integrations.transformers import NF4Config

    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    config = NF4Config(quantize_embeddings=True, skip_modules=["+model.embed_tokens"])
    model = type(tiny_llama()).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.up_proj, nf4.LinearNF4)
