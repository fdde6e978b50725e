"""What each process measures for tests of `nf4 plan`: ``torchrun plan_worker.py CASES FOLDER``.

Bytes are those of storages, each counted once: what a process takes of the system is another
number each time, on a CPU.
"""

import json
import os
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensor_worker
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import nf4

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": False,
}


class Live(TorchDispatchMode):
    """The bytes of all storages that there are, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}
        self.peak = 0

    def see(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = local(tensor).untyped_storage()
                key = id(storage)
                if key not in self.storages:
                    forget = lambda _, key=key: self.storages.pop(key, None)  # noqa: E731
                    self.storages[key] = weakref.ref(storage, forget)
        # A shard's storage is freed by being made empty, and gathered again
        held = [storage() for storage in self.storages.values()]
        self.peak = max(self.peak, sum(one.nbytes() for one in held if one is not None))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.see(tree_leaves(found))
        return found


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that this process has of tensors, shared ones once."""
    storages = {local(t).data_ptr(): local(t).nbytes for t in tensors}
    return sum(storages.values())


def made(case: dict[str, Any]) -> nn.Module:
    """Return the model of a case, quantized and with adapters."""
    config, kind = KINDS[case["kind"]]
    torch.manual_seed(1)
    model = kind(config(**SIZES, attn_implementation=case["attention"])).to(DTYPES[case["dtype"]])
    nf4.quantize_model(model, double_quant=case["double_quant"])
    nf4.add_lora(model, r=case["rank"])
    if case["checkpointing"]:
        model.activation_checkpointing_enable()
    return model.train()


def wrapped(model: nn.Module, method: str, buckets: dict[int, Tensor]) -> nn.Module:
    """Return a model as a method trains it; the buffers of DDP's buckets are remembered."""
    if method == "ddp":
        model = DistributedDataParallel(model)

        def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            buckets[bucket.index()] = bucket.buffer()
            work = dist.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        model.register_comm_hook(None, hook)
    if method == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    if method == "tp":
        tensor_worker.split(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


SCALES = ("absmax", "absmax2", "offset")


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Return bytes by the names of a plan."""
    buckets: dict[int, Tensor] = {}
    inner = made(case)
    model = wrapped(inner, case["method"], buckets)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    tokens = torch.randint(0, SIZES["vocab_size"], (case["batch"], case["length"]))

    def step(saved: dict[int, Tensor] | None = None) -> None:
        def keep(tensor: Tensor) -> Tensor:
            kept = (*inner.parameters(), *inner.buffers())
            own = {p.untyped_storage().data_ptr() for p in map(local, kept)}
            if saved is not None and tensor.untyped_storage().data_ptr() not in own:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(input_ids=tokens, labels=tokens, use_cache=False)
        if saved is not None:
            found["saved"] = sum(t.untyped_storage().nbytes() for t in saved.values())
            saved.clear()
        out.loss.backward()

    found: dict[str, int] = {}
    step({})
    optimizer.step()
    step()  # before which DDP makes its buckets anew
    named = dict(inner.named_parameters())
    found["weights in 4 bits"] = held(p for n, p in named.items() if n.endswith("packed"))
    buffers = dict(inner.named_buffers())
    of_scales = (p for n, p in (named | buffers).items() if n.endswith(SCALES))
    found["scales"] = held(of_scales)
    found["adapters"] = held(p for p in trained)
    rest = (n for n, p in named.items() if not p.requires_grad and "packed" not in n)
    found["dense weights"] = held(named[n] for n in rest if not n.endswith(SCALES))
    found["gradients"] = held(p.grad for p in trained if p.grad is not None)
    states = [s for one in optimizer.state.values() for s in one.values() if s.numel() > 1]
    found["optimizer"] = held(states)
    found["buckets of gradients"] = held(buckets.values())
    gathered: list[int] = []

    def look(module: nn.Module, given: Any) -> None:
        whole = {n: p for n, p in inner.named_parameters() if not hasattr(p, "to_local")}
        gathered.append(held(whole.values()))

    hook = inner.model.layers[1].mlp.register_forward_pre_hook(look)
    with Live() as live:
        live.see([*inner.parameters(), *inner.buffers(), *states, *buckets.values(), tokens])
        live.see(p.grad for p in trained)
        step()
    hook.remove()
    found["gathered"] = gathered[0] if case["method"] == "fsdp" else 0
    found["peak"] = live.peak
    return found


def main() -> None:
    """Measure cases one after another, and save what came of them."""
    cases, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = [measure(case) for case in json.loads(cases)]
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    # At its end an interpreter may be aborted by threads of gloo, of which fully_shard leaves some
    os._exit(0)


if __name__ == "__main__":
    main()
