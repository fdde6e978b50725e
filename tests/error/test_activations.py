"""The second moment of what comes into a model's layers, and scales that are found with it."""

import pytest
import torch
from torch import nn

import nf4


def test_stats_are_the_mean_square_of_each_feature(block) -> None:
    batches = [torch.randn(3, 96), torch.randn(2, 5, 96) * torch.rand(96)]
    seen: list[torch.Tensor] = []
    handle = block.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    stats = nf4.collect_activation_stats(block, batches)
    handle.remove()
    assert list(stats) == ["up", "down"]
    rows = torch.cat([b.reshape(-1, 96) for b in batches])
    torch.testing.assert_close(stats["up"], rows.square().mean(dim=0))
    inner = torch.cat([x.reshape(-1, 160) for x in seen])
    torch.testing.assert_close(stats["down"], inner.square().mean(dim=0))


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: {"input_ids": x}, lambda x: (x,)],
    ids=["tensor", "dict", "tuple"],
)
def test_a_batch_is_what_the_model_takes(wrap, tiny_llama) -> None:
    tokens = torch.randint(320, (2, 16))
    stats = nf4.collect_activation_stats(tiny_llama(), [wrap(tokens)], skip_modules=())
    assert len(stats) == 15 and stats["lm_head"].shape == (64,)
    same = nf4.collect_activation_stats(tiny_llama(), [tokens[:1], tokens[1:]])
    assert set(same) == set(stats) - {"lm_head"}
    for name, found in same.items():
        torch.testing.assert_close(found, stats[name], rtol=1e-4, atol=1e-9)


def test_the_model_is_left_as_it_was(block) -> None:
    block.train()
    block.up.eval()
    seen = []
    nf4.collect_activation_stats(block, [torch.randn(3, 96)] * 2, progress=seen.append)
    assert seen == [1, 2]
    assert block.training and block.down.training and not block.up.training
    assert not any(m._forward_pre_hooks for m in block.modules())
    assert all(p.grad is None for p in block.parameters())


def test_layers_shared_or_never_called(block) -> None:
    block.unused = nn.Linear(4, 4)
    block.again = block.up
    stats = nf4.collect_activation_stats(block, [torch.randn(3, 96)])
    assert set(stats) == {"up", "down", "again"}
    assert torch.equal(stats["again"], stats["up"])


def test_what_cannot_be_collected_is_refused(block) -> None:
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        nf4.collect_activation_stats("gpt2", [])
    with pytest.raises(ValueError, match="found none in ReLU"):
        nf4.collect_activation_stats(nn.ReLU(), [torch.ones(3)])
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        nf4.collect_activation_stats(block, [])
    with pytest.raises(ValueError, match="up: expected finite input, got NaN or an infinity"):
        nf4.collect_activation_stats(block, [torch.full((1, 96), torch.nan)])
    dead = nn.ModuleDict({"a": nn.Linear(4, 4)})
    dead.forward = lambda x: x
    with pytest.raises(ValueError, match="batches: expected some that reach the linear layers"):
        nf4.collect_activation_stats(dead, [torch.ones(4)])


def outputs(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits.double()


def test_a_model_quantized_by_them_computes_more_nearly_what_it_did(tiny_llama) -> None:
    """Features of very different size, as trained models have; a model of random ones has none."""
    dense = tiny_llama().eval()
    for layer in dense.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.copy_(torch.randn(64).exp())
    tokens, held_out = torch.randint(320, (2, 4, 64))
    stats = nf4.collect_activation_stats(dense, [tokens])
    exact = outputs(dense, held_out)

    def error(**options) -> float:
        model = nf4.quantize_model(tiny_llama(), **options)
        model.load_state_dict(
            {n: p for n, p in dense.state_dict().items() if "norm" in n}, strict=False
        )
        return ((outputs(model.eval(), held_out) - exact).norm() / exact.norm()).item()

    plain, weighted = error(scale="mse"), error(scale="mse", weights=stats)
    assert weighted < 0.9 * plain


def test_quantize_model_gives_each_layer_its_own_weights(block) -> None:
    stats = nf4.collect_activation_stats(block, [torch.randn(8, 96) * torch.randn(96).exp()])
    expected = {
        "up": nf4.quantize(block.up.weight, scale="mse", weights=stats["up"]),
        "down": nf4.quantize(block.down.weight, scale="mse"),
    }
    layer = nf4.LinearNF4.from_linear(block.up, scale="mse", weights=stats["up"])
    model = nf4.quantize_model(block, scale="mse", weights={"up": stats["up"]})
    for name, q in expected.items():
        found = model.get_submodule(name).weight.tensors()
        assert all(map(torch.equal, found, q.tensors()))
    assert all(map(torch.equal, layer.weight.tensors(), expected["up"].tensors()))


def test_layers_that_share_a_weight_take_the_weights_of_either(tiny_llama) -> None:
    dense = tiny_llama(tie_word_embeddings=True)
    w, columns = dense.lm_head.weight.detach().clone(), torch.rand(64)
    model = nf4.quantize_model(
        dense, (), quantize_embeddings=True, scale="mse", weights={"lm_head": columns}
    )
    expected = nf4.quantize(w, scale="mse", weights=columns)
    for module in (model.lm_head, model.model.embed_tokens):
        assert all(map(torch.equal, module.weight.tensors(), expected.tensors()))


def test_weights_of_a_model_are_checked_before_it_is_changed(block) -> None:
    with pytest.raises(ValueError, match="weights: expected names of linear layers .* got 'left'"):
        nf4.quantize_model(block, scale="mse", weights={"left": torch.ones(96)})
    with pytest.raises(ValueError, match=r"down: weights: expected shape \(160,\)"):
        nf4.quantize_model(block, scale="mse", weights={"down": torch.ones(96)})
    with pytest.raises(ValueError, match="up: weights: expected scale='mse'"):
        nf4.quantize_model(block, weights={"up": torch.ones(96)})
    with pytest.raises(TypeError, match="weights: expected tensors by name of layer, got list"):
        nf4.quantize_model(block, scale="mse", weights=[torch.ones(96)])
    assert type(block.up) is nn.Linear
