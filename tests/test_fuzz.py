"""Files with one thing wrong, and processes killed in the middle: refused in words, nothing lost.

tests/README.md says what else was tried by hand, and how often.
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutations import mutate_file, mutate_json
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import nf4

# What may come of a wrong file; of the state dict torch itself makes a RuntimeError
REFUSALS = (ValueError, FileNotFoundError, OSError)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
ROUNDS = 100  # of each of the nine kinds of files


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Whole files of each kind: a dense model, one in 4 bits, an adapter."""
    root = tmp_path_factory.mktemp("whole")
    make().save_pretrained(root / "dense", max_shard_size="20KB")
    nf4.quantize_checkpoint(root / "dense", root / "quantized")
    model = nf4.add_lora(nf4.quantize_model(make()), r=2)
    nf4.save_adapter(model, root / "adapter")
    return root


def quantize(folder: Path, target: Path) -> None:
    nf4.quantize_checkpoint(folder, target)


def export(folder: Path, target: Path) -> None:
    nf4.export_checkpoint(folder, target)


def measure(folder: Path, target: Path) -> None:
    nf4.model_error(folder)


class Load:
    """Puts an adapter on a model, which is as before where that is refused."""

    def __init__(self) -> None:
        self.model = nf4.add_lora(nf4.quantize_model(make()), r=2)

    def __call__(self, folder: Path, target: Path) -> None:
        before = {n: t.clone() for n, t in self.model.state_dict().items()}
        modules = dict(self.model.named_modules())
        try:
            nf4.load_adapter(self.model, folder)
        except REFUSALS:
            assert dict(self.model.named_modules()) == modules
            state = self.model.state_dict()
            assert all(torch.equal(state[n], t) for n, t in before.items())
            raise
        self.__init__()


FILES = {
    "index": ("dense", "model.safetensors.index.json", quantize),
    "config": ("dense", "config.json", quantize),
    "weights": ("dense", "*.safetensors", quantize),
    "measured": ("dense", "*.json", measure),
    "quantized_config": ("quantized", "config.json", export),
    "quantized_weights": ("quantized", "*.safetensors", export),
    "adapter_config": ("adapter", "adapter_config.json", Load),
    "adapter_weights": ("adapter", "adapter_model.safetensors", Load),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore")
def test_a_file_with_one_thing_wrong_is_taken_or_refused(kind, folders, tmp_path) -> None:
    source, pattern, run = FILES[kind]
    run = run() if isinstance(run, type) else run
    rng = random.Random(kind)
    refused = 0
    for number in range(ROUNDS):
        folder, target = tmp_path / f"{number}", tmp_path / f"{number}-made"
        shutil.copytree(folders / source, folder)
        mutate_file(rng.choice(sorted(folder.glob(pattern))), rng)
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        try:
            run(folder, target)
        except REFUSALS as error:
            refused += 1
            assert str(error), (kind, number)
            assert not target.exists(), (kind, number)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before, (kind, number)
    assert 0 < refused <= ROUNDS, "mutations are noticed"


def test_bitsandbytes_states_with_one_thing_wrong(tmp_path) -> None:
    """All of a state dict is looked at before the first layer changes."""
    dense = nf4.quantize_model(make())
    whole = nf4.to_bitsandbytes(dense.state_dict())
    model = nf4.quantize_model(make())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    states = sorted(n for n in whole if "quant_state" in n)
    rng, refused = random.Random(1), 0
    for number in range(ROUNDS):
        name = rng.choice(states)
        text = mutate_json(bytes(whole[name].tolist()).decode(), rng)
        data = text.encode("utf-8", "surrogatepass") or b" "
        wrong = {**whole, name: torch.frombuffer(bytearray(data), dtype=torch.uint8)}
        save_file(wrong, tmp_path / "wrong.safetensors")
        try:
            model.load_state_dict(load_file(tmp_path / "wrong.safetensors"))
        except RuntimeError as error:
            refused += 1
            assert name.partition(".weight")[0] in str(error), number
            state = model.state_dict()
            assert all(torch.equal(state[n], t) for n, t in before.items()), number
        else:
            model = nf4.quantize_model(make())
    assert 0 < refused <= ROUNDS


KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)  # so that a fork has all of its threads
import nf4
source, root, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
count, last = 0, None

def audit(event, args):
    global count
    if last is None or not (event == "open" or event.startswith(("os.", "shutil."))):
        return
    if root in str(args):
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(audit)
last = -1
nf4.quantize_checkpoint(source, f"{root}/whole")
total = count
for kill in range(kills):
    pid = os.fork()
    if not pid:
        count, last = 0, 1 + kill * total // kills
        nf4.quantize_checkpoint(source, f"{root}/killed-{kill}")
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status), (kill, status)
    target = f"{root}/killed-{kill}"
    if not os.path.exists(target):
        nf4.quantize_checkpoint(source, target)  # goes on
print(total)
"""


def test_a_killed_process_leaves_nothing_half_written(folders, tmp_path) -> None:
    """Killed at 20 of its steps on files, and called again: the same bytes, and no leftovers."""
    command = [sys.executable, "-c", KILLED, str(folders / "dense"), str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 20
    whole = contents(tmp_path / "whole")
    for kill in range(20):
        assert contents(tmp_path / f"killed-{kill}") == whole, kill
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"whole", *(f"killed-{kill}" for kill in range(20))}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
