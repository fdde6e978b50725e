"""What each process does in tests of tensor parallelism, as worker.py for the others."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import worker
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import nf4
from nf4.tools.ranks import distributed, is_sharded

WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


def dense_model() -> nn.Module:
    """Return a small Llama whose sizes can be split four times, the same in each process."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted_model(kind: str, seed: int = 0) -> nn.Module:
    """Return it quantized, with adapters drawn from a seed."""
    return adapt(quantized_model(kind), seed)


def quantized_model(kind: str) -> nn.Module:
    """Return it quantized with blocks of 32."""
    return nf4.quantize_model(dense_model(), block_size=32, double_quant=kind != "fp32")


def adapt(model: nn.Module, seed: int) -> nn.Module:
    """Put adapters on a model, drawn from a seed, whose terms are not zero."""
    torch.manual_seed(seed)
    nf4.add_lora(model, r=4)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                values = torch.randn(parameter.shape) * 0.05
                parameter.copy_(distributed(values, parameter) if is_sharded(parameter) else values)
    return model.train()


def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split the layers of a Llama, in turn by outputs and by inputs."""
    outputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    outputs += ("mlp.gate_proj", "mlp.up_proj")
    inputs = ("self_attn.o_proj", "mlp.down_proj")
    for layer in model.model.layers:
        plan = {name: nf4.ColwiseParallel() for name in outputs}
        plan |= {name: nf4.RowwiseParallel() for name in inputs}
        parallelize_module(layer, mesh, plan)
    return model


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole state dict, as it is now."""
    state = states.get_model_state_dict(model, options=WHOLE)
    return {name: tensor.clone() for name, tensor in state.items()}


def trained_step(model: nn.Module, part: torch.Tensor) -> dict[str, Any]:
    """Train a step, and return gradients, whole, and the loss after it."""
    parameters = worker.trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    loss = model(input_ids=part, labels=part).loss
    loss.backward()
    grads = {n: p.grad.full_tensor() for n, p in parameters.items()}
    norm = nn.utils.clip_grad_norm_(parameters.values(), 1e9)
    optimizer.step()
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    after = model(input_ids=part, labels=part).loss.detach()
    return {"loss": loss.detach(), "gradients": grads, "norm": norm, "after": after}


def tensor(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Train a split model; of adapters the first process's count."""
    model = adapted_model(kind, seed=rank) if kind != "late" else quantized_model(kind)
    if kind == "fragments":
        for layer in model.modules():
            if isinstance(layer, nf4.LinearNF4):
                layer.to_fragments()
    whole = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("packed"))
    split(model, init_device_mesh("cpu", (ranks,)))
    if kind == "late":
        adapt(model, seed=rank)
    found: dict[str, Any] = {
        "share": sum(p.nbytes for n, p in model.named_parameters() if n.endswith("packed")) / whole,
        "state": gathered(model),
    }
    with torch.no_grad():
        found["logits"] = model.eval()(input_ids=worker.TOKENS).logits
    return found | trained_step(model.train(), worker.TOKENS)


def both(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Train split over two processes, each part sharded over the others."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
    model = split(adapted_model("double_quant"), mesh["tp"])
    options: dict[str, Any] = {"mesh": mesh["dp"]}
    if kind == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    state = gathered(model)
    part = worker.own_part(mesh["dp"].get_local_rank(), ranks // 2)
    return {"state": state} | trained_step(model, part)


def _checkpointed(path: str, rank: int, ranks: int, saves: bool) -> dict[str, Any]:
    """Save what is split, or load it into another model, split over any number of processes."""
    import torch.distributed.checkpoint as files

    model = adapted_model("double_quant", seed=0 if saves else 5)
    if not saves:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.zero_() if name.endswith(("packed", "absmax2")) else None
    if ranks > 1:
        split(model, init_device_mesh("cpu", (ranks,)))
    state = {"model": states.get_model_state_dict(model)}
    if saves:
        files.save(state, checkpoint_id=path)
        model.save_pretrained(Path(path).parent / "folder", is_main_process=rank == 0)
    else:
        files.load(state, checkpoint_id=path)
        states.set_model_state_dict(model, state["model"])
    return {"logits": model(input_ids=worker.TOKENS).logits.detach()}


def refused(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Return what is said where a layer cannot be split."""
    mesh = init_device_mesh("cpu", (ranks,))
    rows, columns = nf4.ColwiseParallel, nf4.RowwiseParallel
    split_twice = nf4.LinearNF4(128, 64)
    parallelize_module(split_twice, mesh, rows())
    embedding = nf4.EmbeddingNF4(nn.Embedding(64, 64), nf4.quantize(torch.randn(64, 64)))
    lone = nf4.QLoRALinear(128, 64, use_dora=True)
    cases = {
        "columns": (nf4.LinearNF4(192, 64), columns()),
        "odd": (nf4.LinearNF4(96, 64), rows()),
        "rows": (nf4.LinearNF4(128, 1), rows()),
        "twice": (split_twice, rows()),
        "dora": (lone, rows()),
        "embedding": (embedding, rows()),
    }
    found = {}
    for name, (layer, style) in cases.items():
        before = str(layer)
        try:
            parallelize_module(layer, mesh, style)
        except (TypeError, ValueError) as error:
            found[name] = str(error)
        assert str(layer) == before
    ia3 = partial(nf4.add_ia3, target_modules=["0"], feedforward_modules=[])
    for name, change in (("merge", nf4.merge), ("adapt", ia3)):
        try:
            change(nn.Sequential(split_twice))
        except ValueError as error:
            found[name] = str(error)
    return found


def opened(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Open a folder of 4-bit weights as transformers plans it, in a folder called kind."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from nf4.integrations.transformers import NF4Config

    how, path = kind.split(":", 1)
    if how in ("dense", "both"):
        both = how == "both"
        config = DistributedConfig(tp_size=2 if both else ranks, fsdp_size=2 if both else 1)
        given = {"quantization_config": NF4Config()} if how == "dense" else {}
        try:
            AutoModelForCausalLM.from_pretrained(path, distributed_config=config, **given)
        except ValueError as error:
            return {"message": str(error)}
    options = {
        "auto": {"tp_plan": "auto"},
        "tensor": {"distributed_config": DistributedConfig(tp_size=ranks)},
        "sharded": {"distributed_config": DistributedConfig(fsdp_size=ranks)},
    }
    model = AutoModelForCausalLM.from_pretrained(path, **options[how])
    packed = [p for n, p in model.named_parameters() if n.endswith("packed")]
    held = sum((p.to_local() if is_sharded(p) else p).nbytes for p in packed)
    with torch.no_grad():
        logits = model(input_ids=worker.TOKENS).logits
    found = {"logits": logits, "held": held, "state": gathered(model)}
    model.save_pretrained(f"{path}-{how}", is_main_process=rank == 0)
    if how == "sharded":
        try:
            nf4.add_lora(model, r=4)
        except ValueError as error:
            return found | {"message": str(error)}
    adapt(model, seed=rank)
    return found | trained_step(model, worker.TOKENS)


TASKS = {
    "both": both,
    "load": partial(_checkpointed, saves=False),
    "opened": opened,
    "refused": refused,
    "save": partial(_checkpointed, saves=True),
    "tensor": tensor,
}

if __name__ == "__main__":
    worker.main(TASKS)
