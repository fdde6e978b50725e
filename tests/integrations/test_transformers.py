"""The plug-in for transformers: models quantized while they load, saved, opened again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import nf4
from nf4.integrations.transformers import NF4Config

ROOT = Path(__file__).resolve().parents[2]
OLDEST = ROOT / ".venv" / "transformers-5.17"
TOKENS = torch.arange(12)[None]


def load(folder, *, dtype=torch.bfloat16, **options) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture
def dense(tiny_llama, tmp_path) -> Path:
    """A folder with a dense model in bf16, in several shards."""
    folder = tmp_path / "dense"
    tiny_llama().bfloat16().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


OPTIONS = {
    "default": {},
    "block_128_single": {"block_size": 128, "double_quant": False},
    "names": {"skip_modules": ["lm_head", "mlp.down_proj"]},
    "pattern": {"skip_modules": r".*\.0\.self_attn|lm_head"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_model_is_quantized_on_load_saved_and_opened(options, dense, tiny_llama, tmp_path) -> None:
    model = load(dense, quantization_config=NF4Config(**options), device_map={"": "cpu"})
    expected = nf4.quantize_model(
        tiny_llama().bfloat16(), **{"skip_modules": ("lm_head",), **options}
    )
    assert same_state(model, expected)
    layers = [m for m in model.modules() if isinstance(m, nf4.LinearNF4)]
    assert layers and all(not t.requires_grad for m in layers for t in m.weight.tensors())
    assert not any(t.is_meta for t in model.state_dict().values())
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert same_state(again, model)
    assert all(not t.requires_grad for m in nf4_layers(again) for t in m.weight.tensors())
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def nf4_layers(model: nn.Module) -> list[nf4.LinearNF4]:
    return [m for m in model.modules() if isinstance(m, nf4.LinearNF4)]


def test_model_of_a_plain_config_takes_its_dtype(dense) -> None:
    model = load(dense, dtype=torch.float32, quantization_config=NF4Config())
    assert {m.dtype for m in nf4_layers(model)} == {torch.float32}
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_tied_output_layer_stays_tied(tiny_llama, tmp_path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    model = load(tmp_path / "tied", quantization_config=NF4Config())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert same_state(load(tmp_path / "saved"), model)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_quantized_on_load_and_stay_tied(tied, tiny_llama, tmp_path) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "dense")
    config = NF4Config(quantize_embeddings=True)
    for folder, options in (("dense", {"quantization_config": config}), ("saved", {})):
        model = load(tmp_path / folder, **options)
        tokens = model.model.embed_tokens
        assert isinstance(tokens, nf4.EmbeddingNF4)
        assert (getattr(model.lm_head, "packed", None) is tokens.packed) == tied
        model.save_pretrained(tmp_path / f"saved{'' if folder == 'dense' else '-again'}")
    assert same_state(load(tmp_path / "saved"), load(tmp_path / "saved-again"))
    with pytest.raises(TypeError, match="quantize_embeddings: expected a bool, got str"):
        NF4Config(quantize_embeddings="yes")


def test_merged_model_is_saved_as_a_dense_one(dense, tmp_path) -> None:
    model = nf4.add_lora(load(dense, quantization_config=NF4Config()), r=2)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
    merged = nf4.merge(model)
    assert not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert not nf4_layers(again) and same_state(again, merged)


@pytest.mark.parametrize("how", ["merge", "dequantize"])
def test_tied_embeddings_in_4_bits_become_dense_and_are_saved(how, tiny_llama, tmp_path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    config = NF4Config(quantize_embeddings=True)
    model = load(tmp_path / "dense", quantization_config=config)
    model = nf4.merge(model) if how == "merge" else model.dequantize()
    model.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert same_state(again, model) and not nf4_layers(again)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_model_quantized_without_the_plug_in_is_saved_with_its_ties(tiny_llama, tmp_path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    nf4.quantize_model(model, skip_modules=(), quantize_embeddings=True)
    model.save_pretrained(tmp_path / "saved")
    nf4.merge(model).save_pretrained(tmp_path / "merged")
    assert same_state(load(tmp_path / "merged", dtype=torch.float32), model)


def test_a_config_is_not_changed_by_the_model_that_it_quantizes(dense) -> None:
    config = NF4Config()
    model = load(dense, quantization_config=config)
    assert config.skip_modules is None
    assert model.config.quantization_config.skip_modules == ["lm_head"]


def test_conv1d_layers_of_gpt2_are_quantized(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    dense = GPT2LMHeadModel(config)
    dense.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype=torch.float32, quantization_config=NF4Config())
    assert same_state(model, nf4.quantize_model(dense))
    assert len(nf4_layers(model)) == 8
    model.save_pretrained(tmp_path / "saved")
    assert same_state(load(tmp_path / "saved", dtype=torch.float32), model)
    merged = nf4.merge(nf4.add_lora(model, r=2))
    assert type(merged.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged", dtype=torch.float32)
    assert same_state(again, merged)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, merged(TOKENS).logits)


HEADS = {
    "classifier": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    "no_head": ("LlamaForCausalLM", "LlamaModel"),
    "head_on_none": ("LlamaModel", "LlamaForCausalLM"),
    "bert_pooler": ("BertForMaskedLM", "BertModel"),
    "bert_classifier": ("BertForMaskedLM", "BertForSequenceClassification"),
    "bert_back": ("BertModel", "BertForMaskedLM"),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
}


@pytest.mark.parametrize(("saved", "opened"), HEADS.values(), ids=HEADS.keys())
def test_quantized_model_opens_with_another_head(saved, opened, tmp_path) -> None:
    """What the files have in 4 bits is that, a head that they do not have is dense and new."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    kind = getattr(transformers, saved)
    options = {"pad_token_id": 0, "intermediate_size": 96, **sizes}
    kind(kind.config_class(**options)).save_pretrained(tmp_path / "dense")
    model = kind.from_pretrained(tmp_path / "dense", quantization_config=NF4Config())
    model.save_pretrained(tmp_path / "saved")
    other = getattr(transformers, opened).from_pretrained(tmp_path / "saved")
    prefix = other.base_model_prefix
    core = {n.removeprefix(f"{prefix}."): m for n, m in model.named_modules()}
    found = {n.removeprefix(f"{prefix}."): m for n, m in other.named_modules()}
    shared = [n for n, m in core.items() if isinstance(m, nf4.LinearNF4) and n in found]
    assert len(shared) >= 8
    assert all(torch.equal(core[n].packed, found[n].packed) for n in shared)
    assert all(torch.isfinite(p).all() for p in other.parameters() if p.is_floating_point())
    other.save_pretrained(tmp_path / "other")
    again = type(other).from_pretrained(tmp_path / "other")
    assert same_state(again, other)


@pytest.fixture
def bitsandbytes_folder(tiny_llama, tmp_path) -> Path:
    """A checkpoint as transformers writes one with bitsandbytes."""
    from safetensors.torch import save_file

    model = nf4.quantize_model(tiny_llama().bfloat16())
    folder = tmp_path / "bitsandbytes"
    folder.mkdir()
    tensors = nf4.to_bitsandbytes(model.state_dict())
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_checkpoint_of_bitsandbytes_opens_as_ours(
    bitsandbytes_folder, tiny_llama, tmp_path
) -> None:
    config = AutoConfig.from_pretrained(bitsandbytes_folder)
    ours = NF4Config.from_bitsandbytes(config.quantization_config)
    config.quantization_config = ours.to_dict()
    model = load(bitsandbytes_folder, config=config)
    assert same_state(model, nf4.quantize_model(tiny_llama().bfloat16()))
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "nf4" and written["stored_as"] == "nf4"
    assert same_state(load(tmp_path / "saved"), model)


def test_model_trains_with_adapters(dense) -> None:
    model = nf4.add_lora(load(dense, quantization_config=NF4Config()), r=4)
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads and all(n.endswith(("lora_A", "lora_B")) for n in grads)
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_dequantize_gives_dense_layers(dense) -> None:
    model = load(dense, quantization_config=NF4Config())
    weight = model.model.layers[0].mlp.up_proj.merged_weight()
    model.dequantize()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
    assert not nf4_layers(model) and not hasattr(model.config, "quantization_config")


BAD_CONFIGS = {
    "block_size": ({"block_size": 48}, ValueError, "block_size: expected a power of two"),
    "double_quant": ({"double_quant": 1}, TypeError, "double_quant: expected a bool, got int"),
    "skip": ({"skip_modules": [3]}, TypeError, "skip_modules: expected names, got 3"),
    "pattern": ({"skip_modules": "("}, ValueError, "skip_modules: expected a regular expression"),
    "of_others": (
        {"bnb_4bit_quant_type": "fp4"},
        ValueError,
        "expected options of nf4, got",
    ),
    "stored_as": ({"stored_as": "gguf"}, ValueError, "stored_as: expected 'nf4' or 'bitsandbytes'"),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_config_refuses(options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        NF4Config(**options)


def test_config_of_bitsandbytes_refuses_what_is_not_nf4() -> None:
    with pytest.raises(ValueError, match="expected load_in_4bit with bnb_4bit_quant_type 'nf4'"):
        NF4Config.from_bitsandbytes(BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="expected one with load_in_4bit"):
        NF4Config.from_bitsandbytes({"quant_method": "gptq"})
    with pytest.raises(TypeError, match="expected a BitsAndBytesConfig, got NF4Config"):
        NF4Config.from_bitsandbytes(NF4Config())


def test_loading_refuses(dense, tiny_llama, tmp_path) -> None:
    with pytest.raises(ValueError, match="found none in LlamaForCausalLM"):
        load(dense, quantization_config=NF4Config(skip_modules=["model", "lm_head"]))
    with pytest.raises(ValueError, match="got 'disk' in"):
        devices = {"model": "cpu", "lm_head": "disk"}
        load(dense, quantization_config=NF4Config(), device_map=devices)
    broken = tiny_llama().bfloat16()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"model.safetensors: {name}: w: expected finite val"):
        load(tmp_path / "broken", quantization_config=NF4Config())


def test_checkpoint_of_bitsandbytes_with_another_codebook_is_refused(bitsandbytes_folder) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(bitsandbytes_folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight.quant_map"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, bitsandbytes_folder / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(bitsandbytes_folder)
    config.quantization_config = NF4Config.from_bitsandbytes(config.quantization_config).to_dict()
    with pytest.raises(ValueError, match=f"{name}: expected the NF4 codebook, got another table"):
        load(bitsandbytes_folder, config=config)


UP = "model.layers.1.mlp.up_proj"
BAD_FILES = {
    "no_scales": (
        lambda tensors: tensors.pop(f"{UP}.absmax2"),
        rf"{UP}.absmax2: expected this tensor in .*model.safetensors, found none",
    ),
    "shape": (
        lambda tensors: tensors.update({f"{UP}.absmax": torch.zeros(3, dtype=torch.uint8)}),
        rf"model.safetensors: {UP}.absmax: expected U8 \(160,\) \(block_size=64, .*got U8 \(3,\)",
    ),
    "dtype": (
        lambda tensors: tensors.update({f"{UP}.packed": tensors[f"{UP}.packed"].float()}),
        rf"model.safetensors: {UP}.packed: expected U8 \(160, 32\) .*, got F32 \(160, 32\)",
    ),
    "other_shape_in_a_layer_that_was_skipped": (
        lambda tensors: tensors.update({"lm_head.packed": torch.zeros(4, 4, dtype=torch.uint8)}),
        r"model.safetensors: lm_head.packed: expected U8 \(320, 32\) .*, got U8 \(4, 4\)",
    ),
    "not_finite": (
        lambda tensors: tensors[f"{UP}.absmax2"].fill_(torch.inf),
        rf"model.safetensors: {UP}.absmax2: expected finite values, got NaN or an infinity",
    ),
    "unknown_kind": (
        lambda tensors: tensors.update({"model.norm.packed": torch.zeros(4, dtype=torch.uint8)}),
        "model.norm.packed: expected weights of layers that nf4 quantizes, got .* a LlamaRMSNorm",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_checkpoint_is_refused_by_tensor_and_file(spoil, message, dense, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "saved"
    load(dense, quantization_config=NF4Config()).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_double_quantized_checkpoint_of_a_single_quantized_config_is_refused(dense, tmp_path):
    folder = tmp_path / "saved"
    load(dense, quantization_config=NF4Config()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["double_quant"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"absmax: expected F32 .*double_quant=False\), got U8"):
        load(folder)
    config["quantization_config"]["codebook"] = "af4"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="codebook: expected 'nf4', got 'af4'"):
        load(folder)


@pytest.mark.parametrize("quantized", [False, True])
def test_truncated_checkpoint_is_named(quantized, dense, tmp_path) -> None:
    folder, options = dense, {"quantization_config": NF4Config()}
    if quantized:
        folder = tmp_path / "saved"
        load(dense, **options).save_pretrained(folder, max_shard_size="100KB")
        options = {}
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{file}: expected a whole safetensors file"):
        load(folder, **options)


def test_bitsandbytes_checkpoint_without_scales_is_refused(bitsandbytes_folder) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(bitsandbytes_folder / "model.safetensors")
    del tensors[f"{UP}.weight.absmax"]
    save_file(tensors, bitsandbytes_folder / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(bitsandbytes_folder)
    config.quantization_config = NF4Config.from_bitsandbytes(config.quantization_config).to_dict()
    with pytest.raises(ValueError, match=f"model.safetensors: {UP}.weight.absmax: expected a ten"):
        load(bitsandbytes_folder, config=config)


MEMORY = """
import re, sys, threading, time
import torch
from transformers import AutoModelForCausalLM
from nf4.integrations.transformers import NF4Config

def anonymous():
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1])

AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=NF4Config())  # warm up
base, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=NF4Config())
done = True
watcher.join()
held = sum(t.nbytes for t in model.state_dict().values())
print(peak - base, held)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_takes_the_4_bit_model_and_two_tensors(tiny_llama, dense, tmp_path) -> None:
    folder = tmp_path / "large"
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 5}
    large = tiny_llama(**sizes)
    dense_bytes = sum(t.nbytes for t in large.state_dict().values())
    tensor = max(t.nbytes for t in large.state_dict().values())
    large.save_pretrained(folder)
    del large
    command = [sys.executable, "-c", MEMORY, str(folder), str(dense)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    peak, held = map(int, done.stdout.split())
    assert dense_bytes > 150e6 and held < 0.2 * dense_bytes
    # 16 MB for what quantize works with, a chunk of elements at a time, and the allocator's slack
    assert peak <= held + 2 * tensor + 16e6, (peak, held, tensor)


@pytest.mark.skipif(
    not OLDEST.is_dir() or os.environ.get("PYTHONPATH") == str(OLDEST),
    reason="needs the oldest supported transformers in .venv, where make test puts it",
)
def test_plug_in_works_with_the_oldest_transformers() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-cov", "-p", "no:xdist", __file__]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    environment = {**inherited, "PYTHONPATH": str(OLDEST)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
