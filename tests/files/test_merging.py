"""Adapters folded into folders, a weight at a time: the bits that the model would have."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import make
from safetensors.torch import load_file, save_file

import nf4
import nf4.tools.streamed
from nf4.commands.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def shaken(model):
    """Give adapters values that do something."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "ia3_l" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def write_adapter(folder, path, put, **options) -> None:
    """Save an adapter of a folder's model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = put(model, **options)
    nf4.save_adapter(shaken(model), path)


def by_the_model(base, adapter, dtype, original=None, opened=torch.float32) -> dict:
    """Return the state dict of what `merge_checkpoint` is to be equal to."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=opened)
    nf4.load_adapter(model, adapter, original=original)
    return nf4.merge(model).to(dtype).state_dict()


def opened(folder) -> dict:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("NF4" in type(m).__name__ for m in model.modules())
    return model.state_dict()


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    different = [
        name
        for name, tensor in expected.items()
        if tensor.dtype != found[name].dtype or not torch.equal(tensor, found[name])
    ]
    assert different == []


def save_base(model, form, path) -> None:
    """Save a model in several files: dense, by nf4, or as bitsandbytes'."""
    if form == "dense":
        model.save_pretrained(path, max_shard_size="100KB")
        return
    ours = path if form == "nf4" else path.with_name("ours")
    nf4.quantize_model(model, ["lm_head"]).save_pretrained(ours, max_shard_size="30KB")
    if form == "bitsandbytes":
        nf4.export_checkpoint(ours, path)


ADAPTERS = {
    "lora": (nf4.add_lora, {"r": 3}),
    "rslora": (nf4.add_lora, {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}),
    "dora": (nf4.add_lora, {"r": 2, "use_dora": True}),
    "ia3": (nf4.add_ia3, {}),
    "adamix": (nf4.add_adamix, {"r": 2, "num_modules": 2}),
}
CASES = [
    *(("nf4", adapter, "bf16") for adapter in ADAPTERS),
    *(("nf4", "dora", dtype) for dtype in ("fp16", "fp32")),
    *((form, adapter, "bf16") for form in ("dense", "bitsandbytes") for adapter in ("lora", "ia3")),
    ("dense", "dora", "fp32"),
]


@pytest.mark.parametrize("form, adapter, dtype", CASES)
def test_the_bits_are_those_of_the_model(form, adapter, dtype, tiny_llama, tmp_path) -> None:
    model = tiny_llama(attention_bias=True).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    save_base(model, "nf4", tmp_path / "first")
    put, options = ADAPTERS[adapter]
    write_adapter(tmp_path / "first", tmp_path / "a", put, **options)
    model = tiny_llama(attention_bias=True).bfloat16()
    model.load_state_dict(make_dense(tmp_path / "first"))
    save_base(model, form, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.txt").write_text("words")
    made = nf4.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "m", dtype)
    found = opened(tmp_path / "m")
    if form != "bitsandbytes":  # transformers' layers of bitsandbytes take no adapters of nf4's
        assert_same(found, by_the_model(tmp_path / "base", tmp_path / "a", DTYPES[dtype]))
        if form == "nf4" and adapter != "ia3":  # whose biases are rounded before they are scaled
            same = by_the_model(
                tmp_path / "base", tmp_path / "a", DTYPES[dtype], None, DTYPES[dtype]
            )
            assert_same(found, same)
    else:
        expected = by_the_model(tmp_path / "ours", tmp_path / "a", DTYPES[dtype])
        assert_same(found, expected)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == made.dtype == str(DTYPES[dtype]).removeprefix("torch.")
    assert (tmp_path / "m" / "tokenizer.txt").read_text() == "words"
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    if dtype == "fp32":
        assert made.relative == 0 and all(row.relative == 0 for row in made.layers)
    else:  # half a step of 8 or 11 bits at most, and about 0.29 of one
        step = 2.0 ** (-8 if dtype == "bf16" else -11)
        assert step / 6 < made.relative < step
        updated = [row.of_update for row in made.layers if row.of_update is not None]
        assert len(updated) == made.adapted and all(0 < value < 0.1 for value in updated)
    assert made.from_original is None and made.adapted > 3


def make_dense(folder) -> dict:
    from transformers import AutoModelForCausalLM

    return nf4.merge(AutoModelForCausalLM.from_pretrained(folder)).state_dict()


@pytest.fixture
def base(tiny_llama, tmp_path):
    """Save a Llama in four bits in several files, what it was made of, and an adapter."""
    tiny_llama().save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    nf4.quantize_checkpoint(tmp_path / "dense", tmp_path / "q")
    write_adapter(tmp_path / "q", tmp_path / "a", nf4.add_lora, r=3)
    return tmp_path / "q"


def test_ranks_that_differ_and_trained_biases(tiny_llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    save_base(tiny_llama(attention_bias=True), "nf4", tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    nf4.add_lora(model, r=4, bias="all", target_modules=["q_proj", "down_proj"])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    nf4.save_adapter(shaken(model), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for key in [k for k in tensors if "layers.1.mlp.down_proj" in k]:
        tensors[key] = tensors[key][:2] if "lora_A" in key else tensors[key][:, :2].contiguous()
    config["rank_pattern"] = {r"^model\.layers\.1\.mlp\.down_proj": 2}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    nf4.merge_checkpoint(tmp_path / "q", tmp_path / "a", tmp_path / "m", torch.bfloat16)
    expected = by_the_model(tmp_path / "q", tmp_path / "a", torch.bfloat16)
    assert_same(opened(tmp_path / "m"), expected)


def test_error_against_the_original(base, tmp_path) -> None:
    made = nf4.merge_checkpoint(base, tmp_path / "a", tmp_path / "m", "bf16", tmp_path / "dense")
    found = opened(tmp_path / "m")
    exact = by_the_model(tmp_path / "dense", tmp_path / "a", torch.float32)
    rounded = by_the_model(base, tmp_path / "a", torch.float32)
    off = size = 0.0
    assert len(made.layers) == 14
    for row in made.layers:
        key = f"{row.name}.weight"
        wide = exact[key].double()
        distance = (found[key].double() - wide).norm()
        assert row.from_original == pytest.approx((distance / wide.norm()).item(), rel=1e-4)
        loss = (found[key].double() - rounded[key].double()).norm() / rounded[key].double().norm()
        assert row.relative == pytest.approx(loss.item(), rel=1e-4)
        off, size = off + distance.item() ** 2, size + wide.norm().item() ** 2
    assert made.from_original == pytest.approx(math.sqrt(off / size), rel=1e-4)
    assert 0.01 < made.from_original < 0.15  # four bits, of which the adapter has none


@pytest.mark.parametrize("name", ["GPT-2", "Mixtral", "Gemma"])
def test_other_architectures(name, tmp_path) -> None:
    """Turned weights; experts, adapted themselves in four bits; tied embeddings in four bits."""
    options = {"quantize_embeddings": True} if name == "Gemma" else {}
    model = nf4.quantize_model(make(name), [] if name == "Gemma" else ["lm_head"], **options)
    model.save_pretrained(tmp_path / "q", max_shard_size="40KB")
    targets = {
        "GPT-2": r".*(c_attn|c_proj)",
        "Mixtral": r".*(q_proj|expert_[02])",
        "Gemma": r".*(q_proj|lm_head)",
    }
    write_adapter(tmp_path / "q", tmp_path / "a", nf4.add_lora, r=2, target_modules=targets[name])
    made = nf4.merge_checkpoint(tmp_path / "q", tmp_path / "a", tmp_path / "m", "bf16")
    expected = by_the_model(tmp_path / "q", tmp_path / "a", torch.bfloat16)
    assert_same(opened(tmp_path / "m"), expected)
    assert made.adapted == {"GPT-2": 6, "Mixtral": 10, "Gemma": 3}[name]
    tied = json.loads((tmp_path / "m" / "config.json").read_text()).get("tie_word_embeddings")
    assert not tied if name == "Gemma" else True


def test_what_transformers_keeps_in_fp32_stays_so(tmp_path) -> None:
    """T5's wo in fp16, with an adapter too."""
    model = make("T5").half()  # so that opened in fp16 it is rounded once
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    nf4.add_lora(model, r=2, target_modules=r".*(block\.0.*wo|\.q)")
    nf4.save_adapter(shaken(model), tmp_path / "a")
    nf4.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "m", "fp16")
    found = {k: v for f in (tmp_path / "m").glob("*.safetensors") for k, v in load_file(f).items()}
    expected = type(model).from_pretrained(tmp_path / "base", dtype=torch.float16)
    nf4.load_adapter(expected, tmp_path / "a")
    assert_same(type(model).from_pretrained(tmp_path / "m").state_dict(), dense_state(expected))
    assert {name.split(".")[-2] for name, t in found.items() if t.itemsize > 2} == {"wo"}


def dense_state(model) -> dict:
    return nf4.merge(model).state_dict()


def test_dense_experts_and_what_is_tied_stay(tiny_llama, tmp_path) -> None:
    make("Mixtral").save_pretrained(tmp_path / "mixtral")
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    targets = {"mixtral": ["k_proj"], "tied": ["k_proj"], "apart": ["lm_head"]}
    for name, target in targets.items():
        base = tmp_path / ("tied" if name == "apart" else name)
        write_adapter(base, tmp_path / f"{name}-a", nf4.add_lora, r=2, target_modules=target)
        nf4.merge_checkpoint(base, tmp_path / f"{name}-a", tmp_path / f"{name}-m")
        expected = by_the_model(base, tmp_path / f"{name}-a", torch.float32)
        assert_same(opened(tmp_path / f"{name}-m"), expected)
        config = json.loads((tmp_path / f"{name}-m" / "config.json").read_text())
        assert config["tie_word_embeddings"] == (name == "tied")


def test_pissa_changes_the_base_as_its_start_did(base, tiny_llama, tmp_path) -> None:
    dense = tiny_llama()
    for name, original in (("from_q", None), ("from_dense", tmp_path / "dense")):
        model = nf4.quantize_model(tiny_llama())
        nf4.add_lora(model, r=2, init_lora_weights="pissa", original=original and dense)
        nf4.save_adapter(shaken(model), tmp_path / name)
        made = nf4.merge_checkpoint(base, tmp_path / name, tmp_path / f"{name}-m", None, original)
        expected = by_the_model(base, tmp_path / name, torch.float32, original)
        assert_same(opened(tmp_path / f"{name}-m"), expected)
        assert original is None or 0.02 < made.from_original < 0.15
    with pytest.raises(ValueError, match="original: expected the weights before quantization"):
        nf4.merge_checkpoint(base, tmp_path / "from_dense", tmp_path / "m")
    with pytest.raises(ValueError, match="expected a weight in four bits for an adapter that st"):
        nf4.merge_checkpoint(tmp_path / "dense", tmp_path / "from_q", tmp_path / "m")


def test_an_interrupted_run_goes_on_with_its_errors(base, tmp_path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    given = (base, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        nf4.merge_checkpoint(*given, tmp_path / "m", "bf16", progress=stop)
    assert not (tmp_path / "m").exists()
    done = {f.name: f.stat().st_ino for f in (tmp_path / ".m.part").glob("*.safetensors")}
    made = nf4.merge_checkpoint(*given, tmp_path / "m", "bf16")
    assert len(done) == 3 and all((tmp_path / "m" / n).stat().st_ino == i for n, i in done.items())
    assert made == nf4.merge_checkpoint(*given, tmp_path / "again", "bf16")
    with pytest.raises(KeyboardInterrupt):  # another adapter begins anew
        nf4.merge_checkpoint(*given, tmp_path / "b", "bf16", progress=stop)
    write_adapter(base, tmp_path / "a2", nf4.add_lora, r=2)
    nf4.merge_checkpoint(base, tmp_path / "a2", tmp_path / "b", "bf16")
    assert_same(opened(tmp_path / "b"), by_the_model(base, tmp_path / "a2", torch.bfloat16))
    for folder in ("m", "again"):
        for file in (tmp_path / folder).iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), file
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
        assert not list((tmp_path / folder).glob(".*"))


def change(folder, spoil) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)


PREFIX = "base_model.model.model.layers.1.mlp.up_proj."
BAD = {
    "name": (lambda t: t.update({PREFIX.replace("up_", "no_") + "lora_A.weight": torch.ones(3, 64)})
             , "linear layers of this model, got one of 'model.layers.1.mlp.no_proj'"),
    "shape": (lambda t: t.update({PREFIX + "lora_A.weight": torch.ones(3, 63)}),
              r"up_proj: expected lora_A and lora_B of shapes \(r, 64\)"),
    "rank": (lambda t: t.update({PREFIX + "lora_A.weight": torch.ones(2, 64)}), "up_proj: exp"),
    "nan": (lambda t: t[PREFIX + "lora_B.weight"].fill_(math.nan), "up_proj: expected finite"),
    "bias": (lambda t: t.update({PREFIX + "bias": torch.ones(4)}), "expected no bias with"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_an_adapter_that_does_not_fit_is_refused(case, base, tmp_path) -> None:
    spoil, message = BAD[case]
    change(tmp_path / "a", spoil)
    with pytest.raises(ValueError, match=message):
        nf4.merge_checkpoint(base, tmp_path / "a", tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "dense", "q"]


def test_what_cannot_be_merged_is_refused(base, tiny_llama, tmp_path) -> None:
    a, m = tmp_path / "a", tmp_path / "m"
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match="dtype: expected one of bf16, fp16, fp32, got int8"):
        nf4.merge_checkpoint(base, a, m, "int8")
    with pytest.raises(FileNotFoundError, match="base: expected a folder with config.json"):
        nf4.merge_checkpoint(a, a, m)
    with pytest.raises(FileNotFoundError, match="adapter: expected a folder with adapter_config"):
        nf4.merge_checkpoint(base, base, m)
    with pytest.raises(FileExistsError, match="target_dir: expected a folder that does not exist"):
        nf4.merge_checkpoint(base, a, base)
    with pytest.raises(FileNotFoundError, match="original: expected a folder with config.json"):
        nf4.merge_checkpoint(base, a, m, original=a)
    with pytest.raises(ValueError, match="original: expected dense weights, .* has been quantized"):
        nf4.merge_checkpoint(base, a, m, original=base)
    tiny_llama(intermediate_size=96).save_pretrained(tmp_path / "dense2")
    with pytest.raises(ValueError, match="original: expected shape"):
        nf4.merge_checkpoint(base, a, m, original=tmp_path / "dense2")
    with pytest.raises(ValueError, match="expected lora_A and lora_B of shapes"):
        nf4.merge_checkpoint(tmp_path / "dense2", a, m)
    config = json.loads((base / "config.json").read_text())
    other = {**config, "quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="expected a dense model, or one in NF4, got one by 'gptq"):
        nf4.merge_checkpoint(base, a, m)
    (base / "config.json").write_text(json.dumps(config))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(a / name, base / name)
    with pytest.raises(ValueError, match="base: expected a folder without an adapter of its own"):
        nf4.merge_checkpoint(base, a, m)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "dense2"])
    made = nf4.merge_checkpoint(base, base, m)  # a folder that holds both, as save_pretrained's
    assert made.adapted == 14 and not (m / "adapter_config.json").exists()
    assert not (m / "adapter_model.safetensors").exists()


def test_a_weight_that_the_dtype_cannot_hold_is_refused(base, tmp_path) -> None:
    change(tmp_path / "a", lambda t: t[PREFIX + "lora_B.weight"].fill_(3e6))
    with pytest.raises(ValueError, match=r"up_proj.weight: expected base plus .*float16 can hold"):
        nf4.merge_checkpoint(base, tmp_path / "a", tmp_path / "m", "fp16")
    assert not (tmp_path / "m").exists()


def test_the_card_says_what_it_was_made_of(base, tmp_path) -> None:
    nf4.merge_checkpoint(base, tmp_path / "a", tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "weights of `q` in four bits, with the adapter `a` (LORA)" in card
    assert "## 4-bit weights" not in card and "- 4-bit" not in card and "import nf4" not in card
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A model\n\nWords.\n")
    nf4.merge_checkpoint(base, tmp_path / "a", tmp_path / "n", "fp16")
    card = (tmp_path / "n" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# A model\n\nWords.\n\n## Merged weights\n")
    assert "float16" in card


ALONE = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model.dtype, "nf4" in sys.modules)
"""


def test_nf4_merge_is_a_command(base, tmp_path, capsys) -> None:
    given = [str(base), str(tmp_path / "a")]
    options = ["--dtype", "bf16", "--original", str(tmp_path / "dense")]
    assert main(["merge", *given, str(tmp_path / "m"), *options]) == 0
    printed = capsys.readouterr().out
    assert "from original + adapter" in printed and "… 2 more" in printed
    assert printed.rstrip().endswith("in " + str(tmp_path / "m")) and "14 layers merged" in printed
    assert main(["merge", *given, str(tmp_path / "n"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["dtype"] == "float32" and len(made["layers"]) == 14
    assert main(["merge", *given, str(tmp_path / "n")]) == 2
    assert capsys.readouterr().err.startswith("nf4 merge: target_dir: expected a folder that does")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["torch.bfloat16", "False"], done.stderr


# A process that another has started inherits its ru_maxrss, and VmHWM not
MEASURE = """
import re, sys
import nf4

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

small, base, adapter, out = sys.argv[1:]
nf4.merge_checkpoint(f"{small}/q", f"{small}/a", f"{small}/m")  # so that all is imported
before = peak()
made = nf4.merge_checkpoint(base, adapter, out)
print(made.bytes_after, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak")
def test_memory_holds_one_weight_at_a_time(base, tiny_llama, tmp_path) -> None:
    """One file becomes one of 73 MiB; the largest weight takes 8 MiB in fp32."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
    large = nf4.quantize_model(tiny_llama(**sizes).bfloat16())
    large.save_pretrained(tmp_path / "large")
    nf4.save_adapter(nf4.add_lora(large, r=2), tmp_path / "large-a")
    given = [tmp_path, tmp_path / "large", tmp_path / "large-a", tmp_path / "large-m"]
    command = [sys.executable, "-c", MEASURE, *map(str, given)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    size, grown = map(int, done.stdout.split())
    assert size > 72 * 2**20 and grown < 48 * 2**20


def test_streamed_file_is_as_safetensors_reads_it(tmp_path) -> None:
    tensors = {
        "bias": torch.randn(3).bfloat16(),
        "odd": torch.randn(5, 3).T.half(),
        "none": torch.empty(0, 4),
        "number": torch.tensor(2.0),
        "index": torch.arange(3),
    }
    names = {**nf4.tools.streamed.NAMES, torch.int64: "I64"}
    forms = {k: (names[t.dtype], t.element_size(), tuple(t.shape)) for k, t in tensors.items()}
    nf4.tools.streamed.Streamed(forms, tensors.__getitem__).save(tmp_path / "f.safetensors")
    found = load_file(tmp_path / "f.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors.items())
    wrong = nf4.tools.streamed.Streamed(forms, lambda name: torch.ones(7))
    with pytest.raises(ValueError, match="index: expected 24 bytes, got 28"):
        wrong.save(tmp_path / "g.safetensors")
