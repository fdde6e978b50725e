"""A Llama cut into stages by hand, each with 4-bit layers and adapters: a rank's part of it."""

from typing import Any

import processes
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from transformers import LlamaConfig, LlamaForCausalLM

import nf4

LAYERS = 4
TOKENS = torch.arange(96).view(8, 12) % 64
MICROBATCHES = 4


def whole_model(kind: str) -> nn.Module:
    """Return the model of one process, with adapters whose terms are not zero."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes, **heads))
    nf4.quantize_model(model)
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).base_model.model
    else:
        nf4.add_lora(model, r=4)
    if kind == "fused":
        nf4.fuse_projections(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


class Stage(nn.Module):
    """Some layers of a Llama, with the embeddings before the first and the head after the last."""

    def __init__(self, whole: Any, index: int, stages: int) -> None:
        super().__init__()
        self.model = nn.Module()  # names of parameters are those of the whole model
        own = torch.arange(LAYERS).chunk(stages)[index].tolist()
        self.model.layers = nn.ModuleDict({str(i): whole.model.layers[i] for i in own})
        self.model.rotary_emb = whole.model.rotary_emb
        self.model.embed_tokens = whole.model.embed_tokens if index == 0 else None
        last = index == stages - 1
        self.model.norm, self.lm_head = (whole.model.norm, whole.lm_head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the last stage, and states of the others; of tokens in the first."""
        x = x if self.model.embed_tokens is None else self.model.embed_tokens(x)
        places = self.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        for layer in self.model.layers.values():
            x = layer(x, position_embeddings=places)
        return x if self.lm_head is None else self.lm_head(self.model.norm(x))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean loss of the tokens that come next."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def schedule_of(name: str, rank: int, ranks: int, kind: str) -> tuple[Any, nn.Module]:
    """Return a schedule, and this rank's stages: one, or two of a loop through all ranks."""
    schedule = getattr(pipelining, name)
    indices = [rank, rank + ranks] if issubclass(schedule, PipelineScheduleMulti) else [rank]
    count, whole = ranks * len(indices), whole_model(kind)
    modules = nn.ModuleList(Stage(whole, index, count) for index in indices)
    stages = [
        PipelineStage(module, index, count, torch.device("cpu"))
        for index, module in zip(indices, modules, strict=True)
    ]
    given = stages if len(stages) > 1 else stages[0]
    return schedule(given, n_microbatches=MICROBATCHES, loss_fn=loss_of), modules


def task(rank: int, ranks: int, kind: str, *names: str) -> dict[str, Any]:
    """Train a step by each schedule."""
    found = {}
    for name in names:
        schedule, modules = schedule_of(name, rank, ranks, kind)
        losses: list[Tensor] = []
        given = (TOKENS,) if rank == 0 else ()
        schedule.step(*given, target=TOKENS, losses=losses)
        grads = {n: p.grad for module in modules for n, p in trained(module).items()}
        found[name] = {"losses": [x.detach() for x in losses], "gradients": grads}
    return found


if __name__ == "__main__":
    processes.main(task)
