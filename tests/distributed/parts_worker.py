"""What each process does in tests of what users do with models of which it has a part."""

import os
import tempfile
from pathlib import Path
from typing import Any

import tensor_worker
import torch
import torch.distributed as dist
import worker
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import nf4
from nf4.tools.ranks import whole


def layers(*kinds: type[nn.Module], bias: bool = True, r: int = 4) -> nn.Sequential:
    """Return layers of 128 to 256 and back, the same in each process."""
    torch.manual_seed(3)
    sizes = ((128, 256), (256, 128))
    made = [nn.Linear(*one, bias=bias) for one in sizes]
    model = nf4.quantize_model(nn.Sequential(*made), skip_modules=(), block_size=32)
    return nf4.add_lora(model, r=r) if nf4.QLoRALinear in kinds else model


def split(model: nn.Module) -> nn.Module:
    """Split two layers over all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"0": nf4.ColwiseParallel(), "1": nf4.RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def said(function: Any) -> str:
    """Return what is said where something is refused."""
    try:
        function()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return ""


def kinds_of(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


def refused(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Ask for what a part cannot have; a dense layer comes first, which is to stay as it is."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(128, 128), *split(layers()))
    before = kinds_of(model)
    options = {"target_modules": ["0", "1", "2"]}
    mend = {
        "merge": lambda: nf4.merge(model),
        "requantize": lambda: nf4.merge(split(layers(nf4.QLoRALinear)), requantize=True),
        "ia3": lambda: nf4.add_ia3(model, **options, feedforward_modules=[]),
        "dora": lambda: nf4.add_lora(model, **options, use_dora=True),
        "pissa": lambda: nf4.add_lora(split(layers()), r=4, init_lora_weights="pissa"),
        "peft": lambda: get_peft_model(split(layers()), LoraConfig(target_modules=["0", "1"])),
    }
    found = {name: said(function) for name, function in mend.items()}
    with tempfile.TemporaryDirectory() as folder:
        ia3 = {"target_modules": ["1", "2"], "feedforward_modules": []}
        other = nf4.add_ia3(nn.Sequential(nn.Identity(), *layers()), **ia3)
        nf4.save_adapter(other, Path(folder) / "ia3")
        found["load"] = said(lambda: nf4.load_adapter(model, Path(folder) / "ia3"))
    assert kinds_of(model) == before
    other = layers(nf4.QLoRALinear)
    for parameter in other.parameters():
        if parameter.is_floating_point():
            parameter.data += 1
    parts = split(layers(nf4.QLoRALinear))
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    y = parts(x)
    found["plain"] = said(lambda: parts.load_state_dict(other.state_dict()))
    part = {name: tensor for name, tensor in other.state_dict().items() if "absmax2" not in name}
    found["partial"] = said(lambda: parts.load_state_dict(part, strict=False))
    assert torch.equal(parts(x), y)
    return found


def used(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Do with a split model what one does with others; return what differs from a whole one."""
    one = layers(nf4.QLoRALinear)
    for parameter in (p for n, p in one.named_parameters() if "lora_B" in n):
        nn.init.normal_(parameter, std=0.1)
    whole_state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    parts = split(layers(nf4.QLoRALinear))
    given = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(parts, dict(whole_state) if rank == 0 else {}, options=given)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    loaded = {name: tensor.clone() for name, tensor in parts.state_dict().items()}
    parts.load_state_dict(loaded)
    for tensor in loaded.values():  # which are the caller's
        tensor.zero_()
    y, y_named = parts(x), parts[1](input=parts[0](input=x))
    state = parts.state_dict()
    for name, tensor in state.items():
        state[name] = whole(tensor)
    theirs, right = (nf4.to_bitsandbytes(one) for one in (state, one.state_dict()))
    path = Path(kind)
    nf4.add_lora(parts, r=4, adapter_name="other")
    nf4.set_adapter(parts, "default")
    again = torch.equal(parts(x), y)
    nf4.save_adapter(parts, path / "adapter", "default")
    restored = split(layers(nf4.QLoRALinear))
    nf4.load_adapter(restored, path / "adapter")
    return {
        "output": (y - one(x)).abs().max(),
        "named": (y_named - y).abs().max(),
        "state": all(torch.equal(state[n], t) for n, t in whole_state.items()),
        "again": again,
        "theirs": all(torch.equal(theirs[name], tensor) for name, tensor in right.items()),
        "restored": (restored(x) - y).abs().max(),
    }


def biases(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Train biases, also where outputs are parts of a sequence; save and load them."""
    path = Path(kind)
    one = nf4.add_lora(layers(), r=4, bias="all")
    parts = nf4.add_lora(layers(), r=4, bias="all")
    mesh = init_device_mesh("cpu", (ranks,))
    plan: dict[str, Any] = {
        "0": nf4.ColwiseParallel(input_layouts=Shard(0)),
        "1": nf4.RowwiseParallel(output_layouts=Shard(0)),
    }
    parallelize_module(parts, mesh, plan)
    dense = nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in one))
    for new, old in zip(dense, one, strict=True):
        new.weight.data, new.bias.data = old.merged_weight(), old.bias.detach().clone()
    shipped = {
        "0": ColwiseParallel(input_layouts=Shard(0)),
        "1": RowwiseParallel(output_layouts=Shard(0)),
    }
    parallelize_module(dense, mesh, shipped)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    own = x.chunk(ranks)[rank]
    found: dict[str, Any] = {}
    one(x).square().sum().backward()
    for name, model in (("parts", parts), ("dense", dense)):
        model(own).square().sum().backward()
        grads = [whole(m.bias.grad) for m in model]
        found[name] = [
            ((grad - m.bias.grad).norm() / m.bias.grad.norm()).item()
            for grad, m in zip(grads, one, strict=True)
        ]
    with torch.no_grad():
        for layer in parts:
            layer.bias += 1
    nf4.save_adapter(parts, path / "biases")
    again = nf4.add_lora(layers(), r=4, bias="all")
    parallelize_module(again, mesh, plan)
    nf4.load_adapter(again, path / "biases")
    found["loaded"] = [
        torch.equal(whole(a.bias), whole(b.bias)) for a, b in zip(again, parts, strict=True)
    ]
    return found


def gathered(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Save, load and adapt after an evaluation, which may leave parameters gathered."""
    path = Path(kind)
    torch.manual_seed(0)
    model = nf4.add_lora(layers(), r=4)
    fully_shard(model)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(x)
    found: dict[str, Any] = {"adapt": said(lambda: nf4.add_lora(model, r=4, adapter_name="new"))}
    with torch.no_grad():
        model(x)
    nf4.save_adapter(model, path / "start")
    other = nf4.add_lora(layers(), r=4)
    for parameter in (p for n, p in other.named_parameters() if "lora_B" in n):
        nn.init.ones_(parameter)
    if rank == 0:
        nf4.save_adapter(other, path / "other")
    dist.barrier()
    with torch.no_grad():
        model(x)
    nf4.load_adapter(model, path / "other")
    model.reshard()
    state = {n: whole(t) for n, t in model.state_dict().items() if "lora_B" in n}
    found["loaded"] = [bool((tensor == 1).all()) for tensor in state.values()]
    found["merge"] = said(lambda: nf4.merge(model))
    return found


def stages(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Save the adapters of a stage that the first process has nothing of."""
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("pp", "tp"))
    model = layers(nf4.QLoRALinear)
    plan = {"0": nf4.ColwiseParallel(), "1": nf4.RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    if rank == ranks - 1:
        nf4.save_adapter(model, Path(kind) / "stage")
    return {"files": sorted(os.listdir(Path(kind) / "stage")) if rank == ranks - 1 else []}


def llama(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Save a Llama without biases and adapters; an adapter on its dense layers alone."""
    path = Path(kind)
    model = nf4.quantize_model(worker.dense_model(), block_size=32)
    model.save_pretrained(path / "one") if rank == 0 else None
    tensor_worker.split(model, init_device_mesh("cpu", (ranks,)))
    model.save_pretrained(path / "parts", is_main_process=rank == 0)
    nf4.add_lora(model, r=4, target_modules=["lm_head"])
    nf4.save_adapter(model, path / "head")
    weights = [path / name / "model.safetensors" for name in ("one", "parts")]
    dist.barrier()
    same = weights[0].read_bytes() == weights[1].read_bytes()
    return {"same": same, "files": sorted(os.listdir(path / "head"))}


TASKS = {
    "biases": biases,
    "gathered": gathered,
    "llama": llama,
    "refused": refused,
    "stages": stages,
    "used": used,
}

if __name__ == "__main__":
    worker.main(TASKS)
