"""Folders quantized a weight at a time: the same bits as through the model, and resumable."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import nf4
import nf4.files.rewriting
from nf4.commands.cli import main
from nf4.files.planned import plan_checkpoint
from nf4.integrations.transformers import NF4Config
from nf4.tools.shards import Shards


@pytest.fixture
def source(tiny_llama, tmp_path):
    """Save a Llama in several files, with a file beside them."""
    path = tmp_path / "dense"
    tiny_llama().save_pretrained(path, max_shard_size="60KB")
    (path / "tokenizer.txt").write_text("words")
    return path


def assert_same_bits(source, target, kind, **options) -> None:
    expected = kind.from_pretrained(source, quantization_config=NF4Config(**options)).state_dict()
    found = kind.from_pretrained(target).state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def assert_same_files(folder, expected) -> None:
    """Compare byte for byte, folders within too."""
    found, wanted = (
        {f.relative_to(where): f.read_bytes() for f in where.rglob("*") if f.is_file()}
        for where in (folder, expected)
    )
    assert found == wanted


@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 32, "double_quant": False, "scale": "mse"}, {"skip_modules": ["mlp"]}],
    ids=["default", "options", "skip"],
)
def test_the_bits_are_those_of_from_pretrained(options, source, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    seen = []
    made = nf4.quantize_checkpoint(
        source, tmp_path / "q", **options, progress=lambda *done: seen.append(done)
    )
    assert_same_bits(source, tmp_path / "q", AutoModelForCausalLM, **options)
    files = list((tmp_path / "q").glob("*.safetensors"))
    assert len(files) == len(list(source.glob("*.safetensors"))) == len(seen) > 1
    assert made.layers == (9 if "skip_modules" in options else 14)  # lm_head is one of them
    tensors = [t for file in files for t in load_file(file).values()]
    assert made.bytes_after >= sum(t.nbytes for t in tensors)
    assert made.bytes_after < made.bytes_before
    assert (tmp_path / "q" / "tokenizer.txt").read_text() == "words"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "q"]
    names = {p.name for p in source.iterdir()} | {"README.md"}
    assert {p.name for p in (tmp_path / "q").iterdir()} == names


@pytest.mark.parametrize("kind", ["gpt2", "bert", "tied"])
def test_other_architectures_open_with_the_same_bits(kind, tiny_llama, tmp_path) -> None:
    import transformers as t

    models = {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=96, n_layer=1, n_head=4, vocab_size=320)
        ),
        "bert": lambda: t.BertForMaskedLM(
            t.BertConfig(
                hidden_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=128,
                vocab_size=320,
            )
        ),
        "tied": lambda: tiny_llama(tie_word_embeddings=True),
    }
    model = models[kind]()
    model.save_pretrained(tmp_path / "dense")
    nf4.quantize_checkpoint(tmp_path / "dense", tmp_path / "q")
    assert not (tmp_path / "q" / "model.safetensors.index.json").exists()
    assert_same_bits(tmp_path / "dense", tmp_path / "q", type(model))


def test_experts_stay_dense_and_the_folder_opens(tmp_path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, num_local_experts=3,
    )  # fmt: skip
    dense = MixtralForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="left dense are 1 MixtralExperts, experts of a mixture"):
        assert nf4.quantize_checkpoint(tmp_path / "dense", tmp_path / "q").layers == 4
    model = MixtralForCausalLM.from_pretrained(tmp_path / "q").eval()
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts.down_proj, dense.model.layers[0].mlp.experts.down_proj)
    nf4.quantize_model(dense, r"lm_head|.*experts|.*gate")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits)


def test_an_interrupted_run_goes_on(source, tmp_path, monkeypatch) -> None:
    written = []
    save = nf4.files.rewriting.save_tensors

    def failing(tensors, file) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        save(tensors, file)

    monkeypatch.setattr(nf4.files.rewriting, "save_tensors", failing)
    with pytest.raises(KeyboardInterrupt):
        nf4.quantize_checkpoint(source, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    beside = tmp_path / ".q.part"
    cut = beside / written[0]
    cut.write_bytes(cut.read_bytes()[:-10])  # as if the machine had died
    first, written[:] = list(written), []
    monkeypatch.setattr(
        nf4.files.rewriting,
        "save_tensors",
        lambda t, file: (written.append(file.name), save(t, file)),
    )
    nf4.quantize_checkpoint(source, tmp_path / "q")
    everything = sorted(p.name for p in source.glob("*.safetensors"))
    assert written == [name for name in everything if name != first[1]]
    assert not beside.exists()
    nf4.quantize_checkpoint(source, tmp_path / "again")
    assert_same_files(tmp_path / "q", tmp_path / "again")


def test_other_options_begin_anew(source, tmp_path, monkeypatch) -> None:
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        nf4.quantize_checkpoint(source, tmp_path / "q", block_size=32)
    monkeypatch.setattr(os, "rename", rename)
    nf4.quantize_checkpoint(source, tmp_path / "q")
    nf4.quantize_checkpoint(source, tmp_path / "again")
    assert_same_files(tmp_path / "q", tmp_path / "again")


def test_a_changed_source_is_read_again(source, tmp_path) -> None:
    """Even one of the same size and age: files are known by their hash."""

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nf4.quantize_checkpoint(source, tmp_path / "q", progress=stop)
    file = sorted(source.glob("*.safetensors"))[1]
    stat, data = file.stat(), bytearray(file.read_bytes())
    middle = (len(data) // 8 + 1000) // 4 * 4
    data[middle : middle + 400] = bytes(400)
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    nf4.quantize_checkpoint(source, tmp_path / "q")
    nf4.quantize_checkpoint(source, tmp_path / "again")
    assert_same_files(tmp_path / "q", tmp_path / "again")


def test_the_same_source_gives_the_same_bytes_and_names_no_place(source, tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere" / "source"
    shutil.copytree(source, elsewhere)
    for place, name in ((source, "a"), (elsewhere, "b")):
        nf4.quantize_checkpoint(place, tmp_path / name)
    assert_same_files(tmp_path / "a", tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_what_another_run_left_is_neither_taken_nor_kept(source, tiny_llama, tmp_path) -> None:
    """Files of one size and age of two models, and of more shards, in one hidden folder."""

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    other = tmp_path / "other"
    model = tiny_llama()
    for p in model.parameters():
        p.data.neg_()
    model.save_pretrained(other, max_shard_size="60KB")
    single = tmp_path / "single"
    tiny_llama().save_pretrained(single)
    for folder in (source, other, single):
        for file in folder.glob("*.safetensors"):
            os.utime(file, (1, 1))
    for name, folder in (("a", other), ("b", single)):
        with pytest.raises(KeyboardInterrupt):
            nf4.quantize_checkpoint(source, tmp_path / name, progress=stop)
        nf4.quantize_checkpoint(folder, tmp_path / name)
        nf4.quantize_checkpoint(folder, tmp_path / f"{name}_alone")
        assert_same_files(tmp_path / name, tmp_path / f"{name}_alone")


def test_a_single_shard_keeps_its_index(tiny_llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    dense = tmp_path / "dense"
    tiny_llama().save_pretrained(dense)
    name = "model-00001-of-00001.safetensors"
    (dense / "model.safetensors").rename(dense / name)
    weight_map = dict.fromkeys(load_file(dense / name), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"wq.weight": torch.ones(8, 64)}, dense / "consolidated.safetensors")
    nf4.quantize_checkpoint(dense, tmp_path / "q")
    assert not (tmp_path / "q" / "consolidated.safetensors").exists()
    assert_same_bits(dense, tmp_path / "q", AutoModelForCausalLM)


def test_what_cannot_be_quantized_is_refused(source, tmp_path, tiny_llama) -> None:
    q = tmp_path / "q"
    with pytest.raises(FileNotFoundError, match="source_dir: expected a folder with config.json"):
        nf4.quantize_checkpoint(tmp_path / "no", q)
    with pytest.raises(FileExistsError, match="target_dir: expected a folder that does not exist"):
        nf4.quantize_checkpoint(source, source)
    with pytest.raises(ValueError, match="block_size: expected a power of two"):
        nf4.quantize_checkpoint(source, q, block_size=48)
    with pytest.raises(TypeError, match="double_quant: expected a bool, got int"):
        nf4.quantize_checkpoint(source, q, double_quant=1)
    with pytest.raises(ValueError, match="skip_modules: expected to leave a linear layer"):
        nf4.quantize_checkpoint(source, q, skip_modules=".*")
    assert not q.exists() and not (tmp_path / ".q.part").exists()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    with pytest.raises(ValueError, match="expected a model that transformers can make"):
        nf4.quantize_checkpoint(source, q)
    (source / "config.json").write_text(json.dumps(config))
    nf4.quantize_checkpoint(source, q)
    with pytest.raises(ValueError, match="expected a dense model, its config has a quantization"):
        nf4.quantize_checkpoint(q, tmp_path / "twice")
    whole = tmp_path / "whole"
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(whole)
    with pytest.raises(ValueError, match=r"model.safetensors: model.layers.1.mlp.up_proj.weight"):
        nf4.quantize_checkpoint(whole, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
    file = whole / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors: expected a whole safetensors file"):
        nf4.quantize_checkpoint(whole, tmp_path / "cut")
    save_file({"a": torch.ones(2)}, whole / "model.safetensors")
    with pytest.raises(ValueError, match="skip_modules: expected to leave a linear layer"):
        nf4.quantize_checkpoint(whole, tmp_path / "none")


def test_nf4_quantize_is_a_command(source, tmp_path, capsys) -> None:
    q = tmp_path / "q"
    assert main(["quantize", str(source), str(q), "--json", "--block-size", "128"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["layers"] == 14 and made["bytes_after"] < made["bytes_before"]
    config = json.loads((q / "config.json").read_text())["quantization_config"]
    assert (config["block_size"], config["double_quant"]) == (128, True)
    other = tmp_path / "other"
    options = ["--no-double-quant", "--scale", "mse", "--skip", "mlp", "--skip", "lm_head"]
    assert main(["quantize", str(source), str(other), *options]) == 0
    assert "8 layers" in capsys.readouterr().out
    config = json.loads((other / "config.json").read_text())["quantization_config"]
    assert config["scale"] == "mse" and config["skip_modules"] == ["mlp", "lm_head"]
    assert main(["quantize", str(source), str(q)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("nf4 quantize: target_dir: expected a folder that does not exist")


@pytest.mark.parametrize("options", [{}, {"double_quant": False, "block_size": 32}], ids=str)
def test_what_is_planned_is_what_is_made(options, source, tmp_path) -> None:
    planned = plan_checkpoint(source, ("+model.layers.0.mlp",), **options)
    made = nf4.quantize_checkpoint(source, tmp_path / "made", ("+model.layers.0.mlp",), **options)
    assert sum(one.bytes_before for one in planned) == made.bytes_before
    assert sum(one.bytes_after for one in planned) == made.bytes_after
    assert sum(not one.stays for one in planned) == made.layers
    stays = {one.name: one.stays for one in planned}
    assert stays["lm_head.weight"] == stays["model.layers.0.mlp.up_proj.weight"] == "skip_modules"
    assert stays["model.layers.1.mlp.up_proj.weight"] == ""
    assert stays["model.embed_tokens.weight"] == "no linear layer: embeddings and others"
    assert stays["model.norm.weight"] == "one dimension: norms, biases"


def test_a_dry_run_prints_what_would_be_done_and_writes_nothing(source, tmp_path, capsys) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["quantize", str(source), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"14 .* quantized\n", out) and "in all; nothing was written" in out
    assert "lm_head.weight [320, 64]" in out and "model.embed_tokens.weight [320, 64]" in out
    assert main(["quantize", str(source), "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(Shards.read(source).tensors)
    assert sorted(tmp_path.iterdir()) == before
    assert main(["quantize", str(source)]) == 2
    assert "target: expected a folder to make, got none; or --dry-run" in capsys.readouterr().err
