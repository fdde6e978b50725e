"""Scripts of the guide to several GPUs run as they stand, in several processes on a CPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import clean_environment
from safetensors.torch import load_file

import nf4

GUIDE = Path(__file__).resolve().parents[2] / "notebooks/guides/several_gpus.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.S)
SCRIPTS = {b.split("\n", 1)[0].removeprefix("# "): b for b in BLOCKS if b.startswith("# ")}
# Where each leaves the adapter
ADAPTERS = {
    "trainer.py": "",
    "sft.py": "",
    "loop.py": "",
    "lit.py": "adapter",
    "lit_fsdp.py": "adapter",
    "fsdp.py": "adapter",
    "tensor.py": "",
    "both.py": "",
}


def launch(script: str, source: Path, target: Path) -> str:
    """Run a script of the guide by torchrun, in a folder of its own; return what is logged."""
    file = target.parent / script
    file.write_text(SCRIPTS[script], encoding="utf-8")
    processes = 4 if script == "both.py" else 2
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if script == "loop.py":
        options = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", *options]
    command = [sys.executable, "-m", *launcher, str(file), str(source), str(target)]
    environment = clean_environment(
        HF_HUB_OFFLINE="1",
        ACCELERATE_USE_CPU="true",  # without which it wants a GPU
        TORCH_CPP_LOG_LEVEL="INFO",
        TORCH_DISTRIBUTED_DEBUG="INFO",
    )
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=target.parent
    )
    # An interpreter may be aborted by threads of gloo at its end, when all is written
    ended = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or ended, done.stderr[-9000:]
    return done.stderr


@pytest.fixture
def source(tmp_path_factory, tiny_llama, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("guide") / "model"
    nf4.quantize_model(tiny_llama(intermediate_size=192), block_size=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_guide_has_these_scripts() -> None:
    assert set(SCRIPTS) == set(ADAPTERS)


@pytest.mark.parametrize("script", ADAPTERS)
def test_a_script_of_the_guide_trains(script, source, tmp_path) -> None:
    target = tmp_path / "out"
    logged = launch(script, source, target)
    if script not in ("fsdp.py", "lit_fsdp.py", "tensor.py", "both.py"):
        assert "DDP Initialized with" in logged
    tensors = load_file(target / ADAPTERS[script] / "adapter_model.safetensors")
    trained = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert trained and all(tensor.abs().max() > 0 for tensor in trained)
    if script == "fsdp.py":
        assert [folder.name for folder in target.glob("step*")] == ["step-4"]
