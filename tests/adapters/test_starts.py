"""Starts of adapters: PiSSA, and LoftQ from the dense weights."""

import copy

import pytest
import torch
from helpers import error
from kinds import logits, lora_layers, randomize, with_lora
from safetensors.torch import save_file
from torch import nn

import nf4


@pytest.fixture
def base(tiny_llama) -> nn.Module:
    return nf4.quantize_model(tiny_llama().eval())


def weight_error(model: nn.Module, dense: nn.Module) -> float:
    """Return the relative distance of a model's merged weights from the dense model's."""
    name = "model.layers.1.mlp.up_proj"
    return error(model.get_submodule(name).merged_weight(), dense.get_submodule(name).weight)


@pytest.mark.parametrize("source", ["module", "state_dict", "folder"])
def test_loftq_starts_nearer_to_the_dense_model(source, base, tiny_llama, tmp_path) -> None:
    dense = tiny_llama().eval()
    original = {"module": dense, "state_dict": dense.state_dict(), "folder": tmp_path}[source]
    dense.save_pretrained(tmp_path)
    model = with_lora(base, r=16, init_lora_weights="loftq", original=original)
    plain = with_lora(base, r=16)
    assert weight_error(model, dense) < 0.75 * weight_error(plain, dense)
    assert error(logits(model), logits(dense)) < error(logits(plain), logits(dense))
    for ours, theirs in zip(lora_layers(model), lora_layers(plain), strict=True):
        assert torch.equal(ours.packed, theirs.packed), "the base stays"
    # The adapter fits any copy of the base
    nf4.save_adapter(model, tmp_path / "adapter")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_loftq_is_the_best_of_its_rank(base, tiny_llama) -> None:
    """No s B A of rank r is nearer to what quantization lost (Eckart and Young)."""
    dense = tiny_llama()
    layer = with_lora(base, init_lora_weights="loftq", original=dense).model.layers[0].mlp.up_proj
    lost = dense.model.layers[0].mlp.up_proj.weight - nf4.dequantize(layer.weight)
    singular = torch.linalg.svdvals(lost.double())
    left = lost - layer.scaling * layer.lora_B @ layer.lora_A
    assert left.norm().item() == pytest.approx(singular[4:].norm().item(), rel=1e-4)


def test_pissa_keeps_the_largest_directions_in_full(base, tiny_llama, tmp_path) -> None:
    dense = tiny_llama().eval()
    model = with_lora(base, r=8, init_lora_weights="pissa", original=dense)
    plain = with_lora(base, r=8)
    assert weight_error(model, dense) < weight_error(plain, dense)
    layer = model.model.layers[0].mlp.up_proj
    w = dense.model.layers[0].mlp.up_proj.weight
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    largest = u[:, :8] * s[:8] @ vh[:8]
    assert error(layer.scaling * layer.lora_B @ layer.lora_A, largest) < 1e-4
    assert error(nf4.dequantize(layer.weight), w - largest) < 0.2


def test_pissa_s_files_change_the_base_as_the_start_did(base, tmp_path) -> None:
    model = with_lora(base, init_lora_weights="pissa")
    randomize(model)
    nf4.save_adapter(model, tmp_path / "pissa")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "pissa")
    assert torch.equal(logits(again), logits(model))
    nf4.load_adapter(again, tmp_path / "pissa")  # the base is not changed twice
    assert torch.equal(logits(again), logits(model))
    nf4.save_adapter(with_lora(base), tmp_path / "plain")
    with pytest.raises(ValueError, match="expected a base as nf4.quantize_model .* by pissa"):
        nf4.load_adapter(again, tmp_path / "plain")
    assert torch.equal(logits(again), logits(model))


def test_conv1d_weights_are_turned(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    dense = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4)).eval()
    save_file({k: v.contiguous() for k, v in dense.state_dict().items() if "lm_head" not in k},
              tmp_path / "model.safetensors")  # fmt: skip
    model = nf4.quantize_model(copy.deepcopy(dense))
    targets = ["attn.c_proj", "c_fc"]  # 64x64, and 64x256
    model = nf4.add_lora(
        model, r=16, target_modules=targets, init_lora_weights="loftq", original=str(tmp_path)
    )
    for name in ("attn.c_proj", "mlp.c_fc"):
        layer = model.transformer.h[0].get_submodule(name)
        w = dense.transformer.h[0].get_submodule(name).weight.T
        assert error(layer.merged_weight(), w) < 0.8 * error(nf4.dequantize(layer.weight), w)


def other(tiny_llama) -> nn.Module:
    model = tiny_llama()
    nn.init.normal_(model.model.layers[1].mlp.down_proj.weight)
    return model


BAD_ORIGINALS = {
    "none": (lambda m: None, ValueError, "original: expected the weights before quantization"),
    "number": (lambda m: 3, TypeError, "original: expected a dense model, .* got int"),
    "empty": (lambda m: {}, ValueError, "expected a weight 'model.layers.0.*q_proj.weight', found"),
    "no_folder": (lambda m: "/nowhere", FileNotFoundError, "expected safetensors, found none at"),
    "another": (
        lambda m: other(m),
        ValueError,
        "expected in model.layers.1.mlp.down_proj.weight what was quantized, got another weight",
    ),
    "smaller": (
        lambda m: {**m().state_dict(), "model.layers.0.mlp.gate_proj.weight": torch.ones(96, 64)},
        ValueError,
        r"expected shape \(160, 64\) of .*gate_proj.weight, got \(96, 64\)",
    ),
}


@pytest.mark.parametrize(
    ("original", "kind", "message"), BAD_ORIGINALS.values(), ids=BAD_ORIGINALS.keys()
)
def test_bad_original_is_refused_before_anything_changes(
    original, kind, message, base, tiny_llama
) -> None:
    with pytest.raises(kind, match=message):
        nf4.add_lora(base, init_lora_weights="loftq", original=original(tiny_llama))
    with pytest.raises(ValueError, match="r: expected at most 32 for pissa on a weight 32x64"):
        nf4.add_lora(base, r=33, init_lora_weights="pissa")
    assert not lora_layers(base)


def test_truncated_original_is_named(base, tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="model.safetensors: expected a whole safetensors file"):
        nf4.add_lora(base, init_lora_weights="loftq", original=tmp_path)
    assert not lora_layers(base)


def test_pissa_from_the_original_needs_it_again(base, tiny_llama, tmp_path) -> None:
    dense = tiny_llama().eval()
    model = with_lora(base, init_lora_weights="pissa", original=dense)
    randomize(model)
    nf4.save_adapter(model, tmp_path / "pissa")
    again = copy.deepcopy(base)
    with pytest.raises(ValueError, match="original: expected the weights before quantization"):
        nf4.load_adapter(again, tmp_path / "pissa")
    nf4.load_adapter(again, tmp_path / "pissa", original=dense)
    assert torch.equal(logits(again), logits(model))


def test_pissa_s_base_is_never_taken_for_another(base, tmp_path) -> None:
    model = with_lora(base, init_lora_weights="pissa", target_modules=["q_proj"])
    nf4.add_lora(model, r=2, adapter_name="second")
    with pytest.raises(ValueError, match="expected the adapter 'default' to save, whose start"):
        nf4.save_adapter(model, tmp_path / "second", "second")
    with pytest.raises(ValueError, match="expected another name than 'default', which started by"):
        nf4.add_lora(model, target_modules=["k_proj"])
    nf4.save_adapter(with_lora(base, target_modules=["k_proj"]), tmp_path / "plain")
    with pytest.raises(ValueError, match="expected an adapter of model.layers.0.self_attn.q_proj"):
        nf4.load_adapter(model, tmp_path / "plain")
    larger = with_lora(base, r=8, init_lora_weights="pissa", target_modules=["q_proj"])
    nf4.save_adapter(larger, tmp_path / "larger")
    with pytest.raises(ValueError, match="pissa of rank 8 .* got one changed by pissa of rank 4"):
        nf4.load_adapter(model, tmp_path / "larger")


def test_pissa_on_a_model_with_a_compiled_part(tiny_llama, tmp_path) -> None:
    dense = tiny_llama().eval()
    quantized = nf4.quantize_model(copy.deepcopy(dense))
    model = with_lora(quantized, init_lora_weights="pissa", original=dense)
    nf4.save_adapter(model, tmp_path / "adapter")
    other = copy.deepcopy(quantized)
    other.model.layers[0] = torch.compile(other.model.layers[0], backend="eager")
    nf4.load_adapter(other, tmp_path / "adapter", original=dense)
    assert error(logits(other), logits(model)) < 1e-6
