"""A rank is killed: the other ends with an error, and training goes on bit for bit."""

import re
import signal
from pathlib import Path

import death_worker
import processes
import pytest
import torch
from death_worker import STEPS
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

LOST = "Error.*(Connection (closed|reset) by peer|[Bb]roken pipe|[Tt]imed out)"  # gloo's words


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all that a checkpoint of many ranks holds, as one process reads it."""
    dcp_to_torch_save(checkpoint, checkpoint.parent / "read.pt")
    found: dict[str, torch.Tensor] = {}

    def gather(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                gather(f"{name}/{key}", one)
        elif isinstance(value, torch.Tensor):
            found[name] = value

    gather("", torch.load(checkpoint.parent / "read.pt"))
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_goes_on_bit_for_bit_after_a_rank_was_killed(kind, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()

    def given(folder: Path, fate: str, when: int) -> tuple[str, ...]:
        return kind, str(folder), fate, str(when)

    expected = processes.run(death_worker, tmp_path / "0", 2, *given(whole, "none", 0))
    for run, (fate, step) in enumerate([("step", 1), ("save", 2)], start=1):
        started = processes.start(death_worker, tmp_path / str(run), 2, *given(killed, fate, step))
        (status, message), (killed_by, _) = processes.ends(started)
        assert killed_by == -signal.SIGKILL
        assert status == 1 and re.search(LOST, message), message
        # What was done before is whole, and what was being written has another name
        assert max(p.name for p in killed.iterdir() if p.name.isdigit()) == str(step)
        assert (killed / f"{step + 1}.part").exists() == (fate == "save")
        found, right = tensors(killed / str(step)), tensors(whole / str(step))
        assert found.keys() == right.keys() and len(found) > 100
        for name, tensor in right.items():
            assert torch.equal(found[name], tensor), name
    found = processes.run(death_worker, tmp_path / "3", 2, *given(killed, "none", 0))
    for one, right in zip(found, expected, strict=True):
        assert torch.equal(one["losses"], right["losses"]) and right["losses"].all()
    found, right = tensors(killed / str(STEPS)), tensors(whole / str(STEPS))
    for name, tensor in right.items():
        assert torch.equal(found[name], tensor), name
