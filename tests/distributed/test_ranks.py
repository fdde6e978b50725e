"""Training in several processes, on a CPU by gloo: the gradients of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker
from helpers import error

WORKER = Path(worker.__file__)


def run(task: str, kind: str, folder: Path, ranks: int = 2) -> list[dict]:
    """Return what each rank has found."""
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, str(WORKER), task, kind, str(folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST"))}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Hold gradients to those of one process; sums over samples in another order."""
    assert found.keys() == expected.keys() and found
    for name, grad in expected.items():
        assert error(found[name], grad) < 1e-4, name


@pytest.mark.parametrize("kind", ["lora", "peft", "ia3"])
def test_ddp_trains_as_one_process_does(kind, tmp_path) -> None:
    first, second = run("ddp", kind, tmp_path / "ranks")
    if kind != "ia3":  # whose factors start at one
        assert any(not torch.equal(second["drawn"][n], p) for n, p in first["drawn"].items())
    for name, parameter in first["drawn"].items():
        assert torch.equal(first["start"][name], parameter)
        assert torch.equal(second["start"][name], parameter)
    expected = worker.gradients(worker.adapted_model(kind), worker.TOKENS)
    for part in ("gradients", "again", "accumulated", "pair"):
        check(first[part], expected)
        for name, grad in first[part].items():
            assert torch.equal(second[part][name], grad), (part, name)
    assert any(not torch.equal(second["unsynced"][n], g) for n, g in first["unsynced"].items())


@pytest.mark.parametrize("kind", ["lora", "peft"])
def test_accelerate_trains_as_one_process_does(kind, tmp_path) -> None:
    found = run("accelerated", kind, tmp_path / "ranks")
    assert {one["wrapper"] for one in found} == {"DistributedDataParallel"}
    expected = worker.gradients(worker.adapted_model(kind), worker.TOKENS)
    for one in found:
        check(one["gradients"], expected)


@pytest.mark.parametrize("scales", ["double_quant", "fp32"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_training_is_that_of_one_process(ranks, scales, tmp_path) -> None:
    found = run("fsdp", scales, tmp_path / "ranks", ranks)
    model = worker.adapted_model("lora", double_quant=scales == "double_quant")
    expected = worker.gradients(model, worker.TOKENS)
    parameters = worker.trained(model)
    elements = sum(p.numel() for p in parameters.values())
    torch.optim.AdamW(parameters.values(), lr=1e-2).step()
    for rank, one in enumerate(found):
        check(one["gradients"], expected)
        assert one["share"] == 1 / ranks
        part = worker.own_part(rank, ranks)
        loss = model(input_ids=part, labels=part).loss
        assert abs(one["loss"] - loss) < 1e-3 * loss
    assert sum(one["shards"] for one in found) == elements
    assert sum(one["states"] for one in found) == elements


def test_scales_that_are_cast_are_refused_in_words(tmp_path) -> None:
    for one in run("cast", "double_quant", tmp_path / "ranks"):
        assert "absmax2: expected torch.float32, got torch.bfloat16; fully_shard" in one["message"]


def test_a_sharded_checkpoint_is_loaded_by_other_numbers_of_ranks(tmp_path) -> None:
    saved = run("save", str(tmp_path / "checkpoint"), tmp_path / "save")
    for ranks in (1, 2, 4):
        for one in run("load", str(tmp_path / "checkpoint"), tmp_path / str(ranks), ranks):
            assert torch.equal(one["logits"], saved[0]["logits"])
            for ours, right in zip(one["moments"], saved[0]["moments"], strict=True):
                assert torch.equal(ours, right)
