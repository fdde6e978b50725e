"""What each process does in tests of distributed training: ``torchrun worker.py TASK FOLDER``.

Results go to a file for each rank; what is compared with one process the tests compute there.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import nf4

TOKENS = torch.arange(96).view(8, 12) % 64  # a batch, which ranks share


def dense_model() -> nn.Module:
    """Return a small Llama, the same in each process."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def adapted_model(kind: str, double_quant: bool = True, seed: int = 0) -> nn.Module:
    """Return it quantized, with adapters drawn from a seed, whose terms are not zero."""
    model = nf4.quantize_model(dense_model(), double_quant=double_quant)
    torch.manual_seed(seed)
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    elif kind == "ia3":
        nf4.add_ia3(model)
    else:
        nf4.add_lora(model, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by names as without a wrapper."""
    named = model.named_parameters()
    return {n.removeprefix("module."): p for n, p in named if p.requires_grad}


def own_part(rank: int, ranks: int) -> Tensor:
    """Return a rank's share of the batch."""
    return TOKENS.chunk(ranks)[rank]


def gradients(model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the mean loss over batches, one after another."""
    model.zero_grad()
    for batch in batches:
        (model(input_ids=batch, labels=batch).loss / len(batches)).backward()
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}


def ddp(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Train as DistributedDataParallel does, and with what accelerate makes of it."""
    model = adapted_model(kind, seed=rank)  # of which rank 0's is to win
    found: dict[str, Any] = {"drawn": {n: p.detach().clone() for n, p in trained(model).items()}}
    wrapped = DistributedDataParallel(model)
    found["start"] = {n: p.detach().clone() for n, p in trained(wrapped).items()}
    part = own_part(rank, ranks)
    found["gradients"] = gradients(wrapped, part)
    found["again"] = gradients(wrapped, part)
    wrapped.zero_grad()
    first, second = part.chunk(2)
    with wrapped.no_sync():
        (wrapped(input_ids=first, labels=first).loss / 2).backward()
    found["unsynced"] = {n: p.grad.clone() for n, p in trained(wrapped).items()}
    (wrapped(input_ids=second, labels=second).loss / 2).backward()
    found["accumulated"] = {n: p.grad.clone() for n, p in trained(wrapped).items()}
    wrapped.zero_grad()  # two losses of one backward, as preferences are trained
    losses = [wrapped(input_ids=p, labels=p).loss for p in (first, second)]
    (sum(losses) / 2).backward()
    found["pair"] = {n: p.grad.clone() for n, p in trained(wrapped).items()}
    return found


def accelerated(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Train as accelerate does."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(adapted_model(kind))
    part = own_part(rank, ranks)
    accelerator.backward(model(input_ids=part, labels=part).loss)
    grads = {n: p.grad.clone() for n, p in trained(model).items()}
    return {"gradients": grads, "wrapper": type(model).__name__}


def fsdp(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Train sharded, with double quantization or scales in fp32."""
    from torch.distributed.fsdp import fully_shard

    model = adapted_model("lora", double_quant=kind == "double_quant")
    whole = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("packed"))
    layers = model.model.layers
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    packed = [p for n, p in model.named_parameters() if n.endswith("packed")]
    held = sum(p.to_local().nbytes for p in packed)
    part = own_part(rank, ranks)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    model(input_ids=part, labels=part).loss.backward()
    grads = {n: p.grad.full_tensor() for n, p in trained(model).items()}
    shards = [p.grad.to_local().numel() for p in trained(model).values()]
    optimizer.step()
    states = sum(s["exp_avg"].to_local().numel() for s in optimizer.state.values())
    loss = model(input_ids=part, labels=part).loss.detach()
    return {
        "gradients": grads,
        "share": held / whole,
        "shards": sum(shards),
        "states": states,
        "loss": loss,
    }


def cast(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Let fully_shard cast the scales, and return what is said to it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = adapted_model("lora", double_quant=kind == "double_quant")
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    try:
        model(input_ids=TOKENS)
    except TypeError as error:
        return {"message": str(error)}
    return {}


def _checkpointed(path: str, rank: int, ranks: int, saves: bool) -> dict[str, Any]:
    """Train a step and save, or load into another model; return what is computed then."""
    import torch.distributed.checkpoint as files
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    model = adapted_model("lora", seed=0 if saves else 5)
    if not saves:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("absmax2"):  # another weight, which is to be replaced
                    parameter.mul_(2)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    if saves:
        part = own_part(rank, ranks)
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states}
    if saves:
        files.save(state, checkpoint_id=path)
    else:
        files.load(state, checkpoint_id=path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    moments = [s["exp_avg"].full_tensor() for s in optimizer.state.values()]
    return {"logits": model(input_ids=TOKENS).logits.detach(), "moments": moments}


TASKS = {
    "accelerated": accelerated,
    "cast": cast,
    "ddp": ddp,
    "fsdp": fsdp,
    "load": partial(_checkpointed, saves=False),
    "save": partial(_checkpointed, saves=True),
}


def main() -> None:
    """Do a task, and save what came of it."""
    task, kind, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = TASKS[task](kind, rank, ranks)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # At its end an interpreter may be aborted by threads of gloo, of which fully_shard leaves some
    os._exit(0)


if __name__ == "__main__":
    main()
