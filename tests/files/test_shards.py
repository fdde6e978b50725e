"""The weight files of a folder: what does not agree is refused before anything is written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import nf4
from nf4.commands.cli import main
from nf4.tools.shards import INDEX, Shards, read_index, read_json

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(tiny_llama, tmp_path):
    path = tmp_path / "dense"
    tiny_llama().save_pretrained(path, max_shard_size="100KB")
    return path


def index_of(folder) -> dict:
    return json.loads((folder / INDEX).read_text())


def write_index(folder, index) -> None:
    (folder / INDEX).write_text(json.dumps(index))


def change(folder, name, value) -> None:
    """Put another tensor, or none, in the place of one, and leave the index."""
    file = folder / index_of(folder)["weight_map"][name]
    tensors = load_file(file)
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


def omit_a_shard(folder) -> None:
    index = index_of(folder)
    shard = index["weight_map"][UP]
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != shard}
    write_index(folder, index)


def lose_a_tensor_everywhere(folder) -> None:
    change(folder, UP, None)
    index = index_of(folder)
    del index["weight_map"][UP]
    write_index(folder, index)


def twice(folder) -> None:
    files = sorted(folder.glob("*.safetensors"))
    shutil.copy(files[0], files[1])


def elsewhere(folder) -> None:
    index = index_of(folder)
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][UP] = next(f for f in files if f != index["weight_map"][UP])
    write_index(folder, index)


def not_in_the_index(folder) -> None:
    index = index_of(folder)
    del index["weight_map"][UP]
    write_index(folder, index)


SPOILED = {
    "missing_from_a_shard": (
        lambda f: change(f, UP, None),
        f"expected {UP} in model-0.*found none",
    ),
    "lost": (
        lose_a_tensor_everywhere,
        f"expected {UP} of LlamaForCausalLM in the files, found none",
    ),
    "shard_not_in_the_index": (
        omit_a_shard,
        r"expected all of \d+ files of weights, .* not in the in",
    ),
    "the_same_twice": (twice, "expected it in one file, got it in model-00001-of"),
    "in_another_file": (elsewhere, f"expected {UP} in .*, found it in model-0"),
    "not_in_the_index": (
        not_in_the_index,
        f"expected every tensor, {UP} of model-0.* is not in it",
    ),
    "other_shape": (
        lambda f: change(f, UP, torch.ones(159, 64)),
        rf"{UP}: expected shape \(160, 64\) for LlamaForCausalLM, got \(159, 64\)",
    ),
    "flat": (lambda f: change(f, UP, torch.ones(160 * 64)), r"expected shape .* got \(10240,\)"),
    "empty": (lambda f: change(f, UP, torch.ones(0, 64)), r"expected shape .* got \(0, 64\)"),
    "norm": (
        lambda f: change(f, "model.norm.weight", torch.ones(65)),
        r"model.norm.weight: expected shape \(64,\)",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_an_incomplete_source_is_refused(spoil, message, source, tmp_path) -> None:
    spoil(source)
    with pytest.raises(ValueError, match=message):
        nf4.quantize_checkpoint(source, tmp_path / "q")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_a_lost_expert_is_refused(tmp_path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, num_local_experts=3,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="1 MixtralExperts, experts of a mixture"):
        nf4.quantize_checkpoint(tmp_path / "dense", tmp_path / "q")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    lost = next(name for name in tensors if "experts.1.w2" in name)
    del tensors[lost]
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"expected 18432 elements of .*experts.down_proj .* 12288"
    ):
        nf4.quantize_checkpoint(tmp_path / "dense", tmp_path / "again")


def test_what_is_tied_or_ignored_may_be_missing(tiny_llama, tmp_path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    nf4.quantize_checkpoint(tmp_path / "tied", tmp_path / "q")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    nf4.quantize_checkpoint(tmp_path / "tied", tmp_path / "other")


def test_files_in_folders_stay_there(source, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    names = sorted(tensors)
    weight_map = {}
    for place, own in (("a", names[::2]), ("b", names[1::2])):
        (source / place).mkdir()
        save_file({n: tensors[n] for n in own}, source / place / "m.safetensors")
        weight_map |= dict.fromkeys(own, f"{place}/m.safetensors")
    write_index(source, {"metadata": {}, "weight_map": weight_map})
    assert Shards.read(source).files == ["a/m.safetensors", "b/m.safetensors"]
    nf4.quantize_checkpoint(source, tmp_path / "q")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    wanted = nf4.quantize_model(AutoModelForCausalLM.from_pretrained(source))
    assert len(expected) == len(names)
    assert all(torch.equal(t, found.state_dict()[n]) for n, t in wanted.state_dict().items())
    assert (tmp_path / "q" / "b" / "m.safetensors").is_file()


OUTSIDE = ["../secret.safetensors", "/etc/passwd", "a/../../b", "c:\\x", "..\\x", "", 3, None]


@pytest.mark.parametrize("name", OUTSIDE, ids=str)
def test_an_index_names_files_in_its_folder(name, source, tmp_path) -> None:
    save_file({UP: torch.ones(160, 64)}, tmp_path / "secret.safetensors")
    index = index_of(source)
    index["weight_map"][UP] = name
    write_index(source, index)
    for read in (
        lambda: nf4.quantize_checkpoint(source, tmp_path / "q"),
        lambda: nf4.model_error(source),
    ):
        with pytest.raises(ValueError, match=f"{UP}: expected the name of a file in this folder"):
            read()


BROKEN = {
    "list": '{"weight_map": ["a"]}',
    "missing": "{}",
    "null": '{"weight_map": null}',
    "empty": '{"weight_map": {}}',
    "number": "3",
    "brackets": "[" * 100_000,
    "cut": '{"weight_map": {"a": ',
    "nothing": "",
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_malformed_index_is_named(text, source, tmp_path, capsys) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (source / INDEX).write_bytes(data)
    for read in (
        read_index,
        lambda file: nf4.model_error(source),
        lambda file: Shards.read(source),
    ):
        with pytest.raises(ValueError, match=rf"{INDEX}: expected (JSON|a weight_map)"):
            read(source / INDEX)
    assert main(["quantize", str(source), str(tmp_path / "q")]) == 2
    message = capsys.readouterr().err
    assert INDEX in message and len(message.splitlines()) == 1 and len(message) < 400
    assert not (tmp_path / "q").exists()


def test_a_config_that_is_no_json_is_named(source, tmp_path) -> None:
    (source / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config"):
        nf4.quantize_checkpoint(source, tmp_path / "q")
    with pytest.raises(ValueError, match="config.json: expected JSON, got"):
        read_json(source / "config.json")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_out_of_the_folder_are_not_copied(source, tmp_path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (source / "own.txt").write_text("own")
    (source / "link.txt").symlink_to(tmp_path / "secret.txt")
    (source / "inside.txt").symlink_to("own.txt")
    with pytest.warns(UserWarning, match=r"link.txt: a link out of its folder, not copied"):
        nf4.quantize_checkpoint(source, tmp_path / "q")
    assert not (tmp_path / "q" / "link.txt").exists()
    assert (tmp_path / "q" / "inside.txt").read_text() == "own"
    assert not (tmp_path / "q" / "inside.txt").is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_folder_of_hugging_face_s_cache_is_copied_whole(source, tmp_path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (source / "tokenizer.json").write_text("{}")
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    nf4.quantize_checkpoint(snapshot, tmp_path / "q")
    assert (tmp_path / "q" / "tokenizer.json").read_text() == "{}"
    assert not any(file.is_symlink() for file in (tmp_path / "q").iterdir())


def test_an_adapter_beside_the_weights_is_copied_and_is_no_weight(source, tmp_path) -> None:
    model = nf4.add_lora(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=2)
    nf4.save_adapter(model, tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, source / file.name)
    nf4.quantize_checkpoint(source, tmp_path / "q")
    for file in (tmp_path / "adapter").iterdir():
        assert (tmp_path / "q" / file.name).read_bytes() == file.read_bytes()
