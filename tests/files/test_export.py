"""Folders of 4-bit weights as bitsandbytes' files: opened without nf4, to the same values."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from architectures import inputs, logits, make
from helpers import error
from safetensors.torch import load_file

import nf4
from nf4.commands.cli import main
from nf4.integrations.transformers import NF4Config

# The library's own warnings; and it computes in the dtype of its config
pytestmark = pytest.mark.filterwarnings("ignore")
DENSE = {"skip_modules": ("lm_head", "cls", "decoder", "wo")}
CASES = {
    "Llama": DENSE,
    "GPT-2": {**DENSE, "double_quant": False},
    "Mixtral": {**DENSE, "block_size": 128},
    "BERT": DENSE,
    "T5": DENSE,
    "ALBERT": {"skip_modules": ("predictions",)},
    "Gemma": {"skip_modules": (), "quantize_embeddings": True},
}
# On CPUs with AVX512 bitsandbytes 0.50 reads rows that are no whole blocks wrong, its own too
WHOLE_BLOCKS = {"intermediate_size": 128, "embedding_size": 64, "d_ff": 128}
ALONE = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import transformers
for kind, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    assert "nf4" not in sys.modules
    given = torch.load(f"{folder}-in")
    # With gradients: without, bitsandbytes computes in bf16 on CPUs that have it
    found = model(**given).logits.detach()
    kinds = sorted({type(m).__name__ for m in model.modules() if "4bit" in type(m).__name__})
    torch.save([found, kinds], f"{folder}-out")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders by model, with the model; and what one process without nf4 computes of them."""
    root, found = tmp_path_factory.mktemp("exported"), {}
    torch.manual_seed(0)
    for name in CASES:
        width = CASES[name].get("block_size", 64)
        sizes = {**WHOLE_BLOCKS, "hidden_size": width, "head_dim": width // 4}
        model = nf4.quantize_model(make(name, **sizes), **CASES[name])
        model.save_pretrained(root / f"{name}-saved", max_shard_size="40KB")
        made = nf4.export_checkpoint(root / f"{name}-saved", root / name)
        assert made.layers and (made.dense > 0) == (name in ("Mixtral", "Gemma"))
        torch.save(inputs(name), root / f"{name}-in")
        found[name] = (root / name, model)
    command = [sys.executable, "-c", ALONE]
    for folder, model in found.values():
        command += [type(model).__name__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("name", CASES)
def test_exported_folder_opens_without_nf4(name, exported) -> None:
    folder, model = exported[name]
    found, kinds = torch.load(f"{folder}-out")
    assert kinds == ["Linear4bit"]
    assert error(found, logits(model, name)) < 1e-5
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    card = (folder / "README.md").read_text()
    assert "bitsandbytes" in card and "import nf4" not in card
    if name == "Llama":  # and back
        ours = NF4Config.from_bitsandbytes(config["quantization_config"])
        loaded = type(model).config_class.from_pretrained(folder)
        loaded.quantization_config = ours.to_dict()
        again = type(model).from_pretrained(folder, config=loaded)
        assert torch.equal(logits(again.eval(), name), logits(model, name))


def test_the_bytes_are_those_of_to_bitsandbytes(tiny_llama, tmp_path) -> None:
    model = nf4.quantize_model(tiny_llama().bfloat16())
    model.save_pretrained(tmp_path / "saved")
    nf4.export_checkpoint(tmp_path / "saved", tmp_path / "exported", "bitsandbytes")
    found = load_file(tmp_path / "exported" / "model.safetensors")
    expected = nf4.to_bitsandbytes(model.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(TypeError, match="state_dict: expected tensors by name, got PosixPath; for"):
        nf4.to_bitsandbytes(tmp_path / "saved")


def test_export_of_a_streamed_folder_with_an_adapter(tiny_llama, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    nf4.quantize_checkpoint(tmp_path / "dense", tmp_path / "saved")
    nf4.save_adapter(nf4.add_lora(nf4.quantize_model(tiny_llama()), r=2), tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, tmp_path / "saved" / file.name)
    seen = []
    nf4.export_checkpoint(
        tmp_path / "saved", tmp_path / "exported", progress=lambda *done: seen.append(done)
    )
    assert len(seen) > 1 and seen[-1][0] == seen[-1][1]
    assert (tmp_path / "exported" / "adapter_model.safetensors").is_file()
    stored = {
        k: v
        for f in (tmp_path / "exported").glob("model*.safetensors")
        for k, v in load_file(f).items()
    }
    assert not [k for k in stored if k.endswith(("packed", "q_proj.weight.offset"))]
    assert sum(k.endswith("quant_state.bitsandbytes__nf4") for k in stored) == 14


def test_export_is_a_command(tiny_llama, tmp_path, capsys) -> None:
    nf4.quantize_model(tiny_llama()).save_pretrained(tmp_path / "saved")
    arguments = [str(tmp_path / "saved"), str(tmp_path / "exported")]
    assert main(["export", "--format", "bitsandbytes", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 14
    assert main(["export", "--format", "bitsandbytes", *arguments]) == 2
    assert "target_dir: expected a folder that does not exist" in capsys.readouterr().err
    assert main(["export", "--format", "gguf", *arguments]) == 2
    assert "format: expected one of bitsandbytes, got 'gguf'" in capsys.readouterr().err
    other = str(tmp_path / "other")
    assert main(["export", "--format", "bitsandbytes", str(tmp_path / "saved"), other]) == 0
    assert capsys.readouterr().out.startswith("14 layers in four bits; 0.2 MB in ")


def test_what_cannot_be_exported_is_refused(tiny_llama, tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="source_dir: expected a folder with config.json"):
        nf4.export_checkpoint(tmp_path / "none", out)
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="expected a quantization_config of nf4, got none"):
        nf4.export_checkpoint(tmp_path / "dense", out)
    with pytest.raises(ValueError, match="stored_as: expected 'nf4' for a dense model, got 'bits"):
        config = NF4Config(stored_as="bitsandbytes")
        type(tiny_llama()).from_pretrained(tmp_path / "dense", quantization_config=config)
    nf4.quantize_model(tiny_llama()).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj"
    for spoil, message in (
        (lambda t: t.pop(f"{name}.absmax"), f"{name}: expected packed and absmax, found one"),
        (
            lambda t: t.update({f"{name}.absmax2": torch.ones(9)}),
            rf"{name}.absmax2: expected shape",
        ),
        (
            lambda t: t.update({f"{name}.absmax": torch.ones(160)}),
            rf"{name}.absmax: expected torch",
        ),
        (
            lambda t: t.update({"no.packed": torch.ones(2, 2)}),
            "no.packed: expected a weight of a la",
        ),
    ):
        wrong = dict(tensors)
        spoil(wrong)
        save_file(wrong, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            nf4.export_checkpoint(tmp_path / "saved", out)
    assert not out.exists()


OPEN = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("opened")
    except Exception as error:
        print("mismatched" in str(error))
"""


def test_folder_of_ours_is_refused_where_nf4_is_not_imported(tiny_llama, tmp_path) -> None:
    nf4.quantize_model(tiny_llama()).save_pretrained(tmp_path / "saved")
    tiny_llama().save_pretrained(tmp_path / "dense")
    nf4.quantize_checkpoint(tmp_path / "dense", tmp_path / "streamed")
    folders = [tmp_path / "saved", tmp_path / "streamed"]
    for folder in folders:
        card = (folder / "README.md").read_text()
        assert "import nf4" in card and "from_pretrained" in card
    for first, said in (("", ["True", "True"]), ("import nf4\n", ["opened", "opened"])):
        command = [sys.executable, "-c", first + OPEN, *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.split() == said, done.stderr
        assert "UNEXPECTED" not in done.stderr or not first


def test_the_mark_is_no_weight_to_load_state_dict(tiny_llama, tmp_path) -> None:
    model = nf4.quantize_model(tiny_llama())
    model.save_pretrained(tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].numel() == 0
    assert tensors.keys() - model.state_dict().keys() == {"model.layers.0.self_attn.q_proj.weight"}
    nf4.quantize_model(tiny_llama()).load_state_dict(tensors)  # strictly


def test_a_card_that_is_there_keeps_its_words(tiny_llama, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    head = "---\nlicense: mit\n---\n# A model\n\nWords.\n\n## 4-bit weights\n"
    words = f"{head}\nOld.\n\n# More\n\nEnd.\n"
    (tmp_path / "dense" / "README.md").write_text(words)
    nf4.quantize_checkpoint(tmp_path / "dense", tmp_path / "q")
    card = (tmp_path / "q" / "README.md").read_text()
    assert card.startswith(head)
    assert card.endswith("# More\n\nEnd.\n") and "Old." not in card
    assert card.count("## 4-bit weights") == 1 and "import nf4" in card
