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


def sharded_model(kind: str, rank: int) -> nn.Module:
    """Return an adapted model under fully_shard, as a kind of training has it."""
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    adapter = "peft" if kind == "peft" else "lora"
    model = adapted_model(adapter, double_quant=kind != "fp32")
    saved = model.state_dict() if rank == 0 else {}
    options: dict[str, Any] = {}
    if kind == "mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options["mp_policy"] = policy
    elif kind == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)  # which wants a GPU
    elif kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif kind == "fragments":
        for layer in model.modules():
            if isinstance(layer, nf4.LinearNF4):
                layer.to_fragments()
    elif kind == "meta":
        model.to("meta")
    llama = model.base_model.model if kind == "peft" else model
    for layer in llama.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    if kind == "meta":
        model.to_empty(device="cpu")
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # of no state dict
        given = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        states.set_model_state_dict(model, saved, options=given)
    return model


def fsdp(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Train sharded."""
    from torch.distributed.checkpoint import state_dict as states

    model = sharded_model(kind, rank)
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    packed = [p for n, p in model.named_parameters() if n.endswith("packed")]
    found: dict[str, Any] = {
        "share": sum(p.to_local().nbytes for p in packed) / sum(p.nbytes for p in packed),
        "state": states.get_model_state_dict(model, options=whole),
    }
    part = own_part(rank, ranks)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    model(input_ids=part, labels=part).loss.backward()
    found["gradients"] = {n: p.grad.full_tensor() for n, p in trained(model).items()}
    found["shards"] = sum(p.grad.to_local().numel() for p in trained(model).values())
    optimizer.step()
    moments = (state["exp_avg"] for state in optimizer.state.values())
    found["states"] = sum(moment.to_local().numel() for moment in moments)
    found["loss"] = model(input_ids=part, labels=part).loss.detach()
    return found


def cast(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Let fully_shard cast scales that are parameters, and return what is said to it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = adapted_model("lora", double_quant=kind == "double_quant")
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    try:
        model(input_ids=TOKENS)
    except TypeError as error:
        return {"message": str(error)}
    return {}


def prepared(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Train as accelerate does under fully_shard, which it knows on GPUs alone."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType
    from torch.distributed.checkpoint import state_dict as states

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision="bf16")
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    plugin.set_mixed_precision("bf16")
    model = adapted_model(kind)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    part = own_part(rank, ranks)
    accelerator.backward(model(input_ids=part, labels=part).loss)
    grads = {n: p.grad.full_tensor() for n, p in trained(model).items()}
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "gradients": grads,
        "wrapper": type(model).__name__,
        "state": states.get_model_state_dict(model, options=whole),
        "cast": str(plugin.mixed_precision_policy.param_dtype),
    }


def folder(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Save a sharded model as transformers does, and its adapter, to a folder called kind."""
    from torch.distributed.checkpoint import state_dict as states

    model = sharded_model("double_quant", rank)
    path = Path(kind)
    model.save_pretrained(path / "own", is_main_process=rank == 0)
    nf4.save_adapter(model, path / "adapter")
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = states.get_model_state_dict(model, options=whole)
    if rank == 0:  # as the Trainer does
        model.save_pretrained(path / "given", state_dict=state)
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
        files.async_save(state, checkpoint_id=path).result()  # beside the training, as one may
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
    "folder": folder,
    "fsdp": fsdp,
    "load": partial(_checkpointed, saves=False),
    "prepared": prepared,
    "save": partial(_checkpointed, saves=True),
}


def main(tasks: dict[str, Any]) -> None:
    """Do a task of one kind or several, one after another, and save what came of them."""
    task, kinds, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = [tasks[task](kind, rank, ranks) for kind in kinds.split(",")]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # At its end an interpreter may be aborted by threads of gloo, of which fully_shard leaves some
    os._exit(0)


if __name__ == "__main__":
    main(TASKS)
