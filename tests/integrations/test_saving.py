"""A saved model opens as what it was, or not at all: quantized later, with adapters, merged."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from kinds import ADD, randomize
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaModel

import nf4
from nf4.integrations.transformers import NF4Config

TOKENS = torch.arange(24).view(2, 12) % 320


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def load(folder, **options) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


FORMS = {
    "default": {},
    "skipped": {"skip_modules": ["lm_head", "mlp"], "block_size": 32, "double_quant": False},
    "pattern": {"skip_modules": r".*\.1\..*|lm_head", "scale": "mse"},
    "everything": {"skip_modules": (), "quantize_embeddings": True},
}


@pytest.mark.parametrize(("name", "tied"), [*((n, False) for n in FORMS), ("everything", True)])
def test_model_quantized_after_loading_opens_as_it_was(name, tied, tiny_llama, tmp_path) -> None:
    form = FORMS[name]
    model = nf4.quantize_model(tiny_llama(tie_word_embeddings=tied), **form)
    said = model.config.quantization_config
    skipped = form.get("skip_modules", ("lm_head",))
    assert said.skip_modules == (skipped if isinstance(skipped, str) else list(skipped))
    assert (said.block_size, said.scale) == (
        form.get("block_size", 64),
        form.get("scale", "absmax"),
    )
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert same_state(again, model) and torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert same_state(load(tmp_path / "again"), model)


def test_model_of_several_forms_opens_as_it_was(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    nf4.quantize_model(model.model.layers[0].mlp, block_size=32, double_quant=False)
    nf4.quantize_model(model.model.layers[1])
    by_hand = nf4.LinearNF4.from_linear(model.model.layers[0].self_attn.q_proj, block_size=128)
    model.model.layers[0].self_attn.q_proj = by_hand
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written["forms"]["model.layers.0.self_attn.q_proj"] == [128, True]
    assert same_state(load(tmp_path / "saved"), model)
    core = LlamaModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(core.layers[0].self_attn.q_proj.packed, by_hand.packed)
    assert core.layers[0].mlp.up_proj.block_size == 32


def test_factors_merged_into_scales_open_as_they_were(tiny_llama, tmp_path) -> None:
    model = nf4.add_ia3(nf4.quantize_model(tiny_llama()))
    randomize(model)
    nf4.merge(model, requantize="exact")
    assert {m.double_quant for m in model.modules() if isinstance(m, nf4.LinearNF4)} == {
        True,
        False,
    }
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_the_inner_model_may_be_what_was_quantized(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    nf4.quantize_model(model.model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
    wrapper = nn.ModuleDict({"language": tiny_llama()})
    nf4.quantize_model(wrapper, skip_modules=("language.lm_head",))
    wrapper["language"].save_pretrained(tmp_path / "inside")
    assert same_state(load(tmp_path / "inside"), wrapper["language"])


def test_a_dense_model_of_the_same_config_stays_dense(tiny_llama, tmp_path) -> None:
    dense = tiny_llama()
    model = nf4.quantize_model(type(dense)(dense.config))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert same_state(load(tmp_path / "dense"), dense)
    model.save_pretrained(tmp_path / "saved")
    assert same_state(load(tmp_path / "saved"), model)


def test_config_goes_with_the_last_4_bit_layer(tiny_llama, tmp_path) -> None:
    model = nf4.quantize_model(tiny_llama())
    assert model.config.quantization_config.quant_method == "nf4"
    nf4.merge(model)
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    nf4.quantize_model(model)
    model.dequantize()
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    assert same_state(load(tmp_path / "dense"), model)


def test_copies_and_pickles_are_saved_too(tiny_llama, tmp_path) -> None:
    model = nf4.add_lora(nf4.quantize_model(tiny_llama()), r=2)
    for name, other in (("a", copy.deepcopy(model)), ("b", pickle.loads(pickle.dumps(model)))):
        nf4.merge(other)
        other.save_pretrained(tmp_path / name)
        assert same_state(load(tmp_path / name), other)
    assert model.config.quantization_config is not None


@pytest.mark.parametrize("base", ["quantized", "dense", "loaded"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_adapters_of_ours_are_saved_as_an_adapter_and_open(
    kind, base, tiny_llama, tmp_path
) -> None:
    model = tiny_llama()
    if base == "quantized":
        nf4.quantize_model(model)
    if base == "loaded":
        model.save_pretrained(tmp_path / "dense")
        model = load(tmp_path / "dense", quantization_config=NF4Config())
    ADD[kind](model)
    randomize(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    files = {f.name for f in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json"} <= files
    stored = [k for f in (tmp_path / "saved").glob("model-*.safetensors") for k in load_file(f)]
    assert stored and not [k for k in stored if "lora" in k or "ia3" in k or "adapters" in k]
    assert torch.equal(logits(model), expected)
    again = load(tmp_path / "saved")
    assert (logits(again) - expected).abs().max() < 1e-5


OPTIONS = {
    "pissa": {"init_lora_weights": "pissa"},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "some": {"target_modules": ["q_proj", "down_proj"]},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_adapters_with_options_open_as_they_were(options, tiny_llama, tmp_path) -> None:
    model = nf4.quantize_model(tiny_llama(attention_bias=True))
    nf4.add_lora(model, r=4, **options)
    randomize(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "saved")
    assert (logits(load(tmp_path / "saved")) - logits(model)).abs().max() < 1e-5


def test_several_adapters_are_saved_in_folders_of_their_names(tiny_llama, tmp_path) -> None:
    model = nf4.add_lora(nf4.quantize_model(tiny_llama()), r=2)
    nf4.add_lora(model, r=3, adapter_name="second")
    for name in ("default", "second"):
        randomize(model, name)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "default" / "adapter_config.json").is_file()
    assert (logits(load(tmp_path / "saved")) - logits(model)).abs().max() < 1e-5
    nf4.set_adapter(model, ["default", "second"])
    with pytest.raises(
        ValueError, match="expected at most one active adapter, got default, second"
    ):
        model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()
    nf4.set_adapter(model, None)
    model.save_pretrained(tmp_path / "none")
    assert torch.equal(logits(load(tmp_path / "none")), logits(model))
    with pytest.raises(ValueError, match="push_to_hub: expected False"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)


def test_adapters_that_peft_does_not_know_refuse_to_open(tiny_llama, tmp_path) -> None:
    model = nf4.add_adamix(nf4.quantize_model(tiny_llama()), r=2)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises((ValueError, KeyError), match="ADAMIX"):
        load(tmp_path / "saved")
    other = nf4.quantize_model(tiny_llama())
    nf4.load_adapter(other, tmp_path / "saved")
    assert same_state(other, model)


def test_model_that_another_method_quantized_is_refused(tiny_llama, bnb) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    model = tiny_llama()
    before = copy.deepcopy(model)
    config = BitsAndBytesConfig(load_in_4bit=True)
    model.hf_quantizer = AutoHfQuantizer.from_config(config)
    with pytest.raises(ValueError, match="a quantization_config of 'bitsandbytes'"):
        nf4.quantize_model(model)
    assert same_state(model, before)


ALONE = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
from peft import LoraConfig, get_peft_model
model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
print(sum(type(m).__name__ == "NF4LoraLinear" for m in model.modules()))
"""


@pytest.mark.parametrize(
    "imports", ["import nf4", "import transformers, peft, nf4", "import peft, nf4"]
)
def test_one_import_makes_transformers_and_peft_know_nf4(imports, tiny_llama, tmp_path) -> None:
    nf4.quantize_model(tiny_llama()).save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-c", ALONE.format(imports=imports), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0 and done.stdout == "14\n", done.stderr


def test_a_framework_that_cannot_be_integrated_still_imports(tmp_path) -> None:
    (tmp_path / "framework.py").write_text("value = 1\n")
    (tmp_path / "broken.py").write_text("raise ImportError('too old')\n")
    code = (
        "import importlib.util, warnings, sys\n"
        "from nf4.integrations.lazy import import_with\n"
        "import_with('framework', 'broken')\n"
        "assert importlib.util.find_spec('framework').name == 'framework'\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    import framework\n"
        "print(framework.value, type(framework.__loader__).__name__, said[0].message)\n"
        "assert framework.__spec__.loader is framework.__loader__\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 SourceFileLoader nf4: broken could not be imported: too old\n"


@pytest.mark.filterwarnings("ignore:.*num_workers")
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_trainer_takes_and_keeps_our_adapters_on_a_loaded_model(tiny_llama, tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    tiny_llama().save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=NF4Config())
    how = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 16
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model=model, args=how, train_dataset=data)
    trainer = Trainer(
        model=nf4.add_lora(model, r=4), args=how, train_dataset=data, eval_dataset=data[:2]
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    stored = load_file(f"{best}/adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert torch.equal(model.model.layers[0].mlp.up_proj.lora_B, stored[key])
    assert (logits(load(best)) - logits(model)).abs().max() < 1e-5
    (tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint-4/adapter_model.safetensors: expected a safe"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


PEFTS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "dora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True),
    "head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
}


# PEFT's own
@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("kind", PEFTS)
def test_what_peft_merges_is_a_dense_model(kind, how, tied, tiny_llama, tmp_path) -> None:
    base = tiny_llama(tie_word_embeddings=tied, attention_bias=True)
    nf4.quantize_model(base, skip_modules=(), quantize_embeddings=True)
    torch.manual_seed(2)
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(PEFTS[kind])).eval()
    expected = logits(model)
    if how == "merge_adapter":
        model.merge_adapter()
        assert (logits(model) - expected).abs().max() < 1e-5
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if type(m).__module__.startswith("nf4")]
    assert not hasattr(merged.config, "quantization_config") and not merged.is_quantized
    same = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert same == (tied and kind != "head") == merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    again = load(tmp_path / "merged")
    assert same_state(again, merged) and (logits(again) - expected).abs().max() < 1e-5
    ours = nf4.merge(base)
    assert {n: type(m) for n, m in merged.named_modules()} == {
        n: type(m) for n, m in ours.named_modules()
    }
    nf4.quantize_model(again)  # nothing says that it was quantized once
    again.save_pretrained(tmp_path / "quantized")
    assert same_state(load(tmp_path / "quantized"), again)


def test_unloading_after_merging_keeps_what_was_merged(tiny_llama) -> None:
    base = nf4.quantize_model(tiny_llama())
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(PEFTS["lora"])).eval()
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model).unload()), logits(base))
    model.merge_adapter()
    unloaded = model.unload()
    assert (logits(unloaded) - expected).abs().max() < 1e-5
    kinds = {type(m) for m in unloaded.model.layers[0].self_attn.children()}
    assert kinds == {nn.Linear, nf4.LinearNF4}


def test_a_quantized_head_of_a_tied_model_is_untied(tiny_llama, tmp_path) -> None:
    """Its embeddings stay dense: what is saved opens as it computes."""
    model = nf4.quantize_model(tiny_llama(tie_word_embeddings=True), skip_modules=()).eval()
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_offsets_have_no_dimensions_in_files(tiny_llama, tmp_path) -> None:
    model = nf4.quantize_model(tiny_llama(), quantize_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    offsets = {name: t.shape for name, t in tensors.items() if name.endswith(".offset")}
    assert offsets and set(offsets.values()) == {()}
    opened = type(model).from_pretrained(tmp_path)
    for name, offset in opened.named_buffers():
        if name.endswith(".offset"):
            assert torch.equal(offset, tensors[name])
