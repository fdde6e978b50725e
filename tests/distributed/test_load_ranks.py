"""A folder of 4-bit weights opened by several processes: each reads it once, and holds 4 bits."""

import json
from pathlib import Path

import pytest
from ranks import torchrun

import nf4
from nf4.tools.shards import Shards

WORKER = Path(__file__).with_name("loading.py")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_each_process_reads_each_tensor_once_and_holds_four_bits(tiny_llama, tmp_path) -> None:
    large = tiny_llama(hidden_size=1024, intermediate_size=2048, num_hidden_layers=5)
    dense = sum(t.nbytes for t in large.state_dict().values())
    tensor = max(t.nbytes for t in large.state_dict().values())
    nf4.quantize_model(large).save_pretrained(tmp_path / "large", max_shard_size="4MB")
    nf4.quantize_model(tiny_llama()).save_pretrained(tmp_path / "small")
    files = [file.name for file in (tmp_path / "large").glob("*.safetensors")]
    assert len(files) >= 5
    done = torchrun(2, WORKER, tmp_path / "large", tmp_path / "small", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    names = {*Shards.read(tmp_path / "large").tensors}
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["opened"] == dict.fromkeys(files, 1)
        assert {*found["taken"].values()} == {1} and {*found["taken"]} <= names
        assert all(name in found["taken"] for name in names if name.endswith(".packed"))
        assert dense > 150e6 and found["held"] < 0.2 * dense
        # Of memory that belongs to no file: processes share the pages of files that are mapped
        assert found["peak"] <= found["held"] + tensor, (found["peak"], found["held"])
