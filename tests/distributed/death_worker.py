"""Train with a checkpoint after each step, written beside its place and renamed; or die of it."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import processes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as files
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from worker import TOKENS, dense_model, own_part

import nf4

STEPS = 4


def die() -> None:
    """End this process as the system ends one that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


class DyingWriter(files.FileSystemWriter):
    """Writes this rank's part of a checkpoint, and never says so."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Die when the part is written."""
        super().write_data(plan, planner).wait()
        die()


class Training:
    """A model, its optimizer and what has been computed: all that a checkpoint holds."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        model = nf4.add_lora(nf4.quantize_model(dense_model()), r=4, lora_dropout=0.1).train()
        if kind == "ddp":
            self.model: nn.Module = DistributedDataParallel(model)
        else:
            for layer in model.model.layers:
                fully_shard(layer)
            self.model = fully_shard(model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.losses = torch.zeros(STEPS)  # of this rank
        torch.manual_seed(dist.get_rank())  # what each rank drops is its own

    def state(self) -> dict[str, Any]:
        """Return what is saved; what ranks do not share has a rank's name."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        own = {"losses": self.losses, "random": torch.get_rng_state()}
        return {"model": model, "optimizer": optimizer, f"rank{dist.get_rank()}": own}

    def save(self, folder: Path, steps: int, writer: type[files.FileSystemWriter]) -> None:
        """Write a checkpoint beside its place, and rename it when every rank has written."""
        beside = folder / f"{steps}.part"
        if dist.get_rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)  # of a run that ended while it wrote
        dist.barrier()
        files.save(self.state(), storage_writer=writer(beside))
        if dist.get_rank() == 0:
            beside.rename(folder / str(steps))
        dist.barrier()

    def load(self, folder: Path) -> int:
        """Go on from the last checkpoint that is whole; return after how many steps it was."""
        steps = max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)
        if steps:
            state = self.state()
            files.load(state, checkpoint_id=folder / str(steps))
            weights, moments = state["model"], state["optimizer"]
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=weights,
                optim_state_dict=moments,
            )
            own = state[f"rank{dist.get_rank()}"]
            self.losses = own["losses"]
            torch.set_rng_state(own["random"])
        return steps


def batch(step: int, rank: int, ranks: int) -> Tensor:
    """Return a rank's share of what a step is trained on."""
    return (own_part(rank, ranks) * (step + 1)) % TOKENS.max()


def task(rank: int, ranks: int, kind: str, folder: str, fate: str, when: str) -> dict[str, Any]:
    """Train; the last rank dies in a step or while a checkpoint is written, or lives."""
    training, dies = Training(kind), rank == ranks - 1
    for step in range(training.load(Path(folder)), STEPS):
        now = dies and step == int(when)
        part = batch(step, rank, ranks)
        loss = training.model(input_ids=part, labels=part).loss
        if fate == "step" and now:
            die()
        loss.backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.losses[step] = loss.detach()
        writer = DyingWriter if fate == "save" and now else files.FileSystemWriter
        training.save(Path(folder), step + 1, writer)
    return {"losses": training.losses}


if __name__ == "__main__":
    processes.main(task)
