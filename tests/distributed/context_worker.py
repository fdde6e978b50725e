"""A part of a sequence in each process: keys and values are gathered for attention alone."""

from typing import Any

import processes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pipeline_worker import trained, whole_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from transformers import AttentionInterface

LENGTH = 24
TOKENS = torch.arange(4 * LENGTH).view(4, LENGTH) * 7 % 64


class Gathered(torch.autograd.Function):
    """All ranks' tokens, in turn; ``torch.distributed.nn``'s takes strided gradients amiss."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        """Return tokens ``[samples, heads, tokens, size]`` of all ranks from those of each."""
        parts = [torch.empty(own.shape) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient of this rank's tokens, to which all ranks add."""
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), dim=2)[dist.get_rank()]


def ring_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Attend from this rank's tokens to all until each: what a ring of keys and values computes.

    query, key and value are ``[samples, heads, tokens, size]``, of this rank's tokens.
    """
    rank, own = dist.get_rank(), query.shape[2]
    keys, values = Gathered.apply(key), Gathered.apply(value)
    place = torch.arange(keys.shape[2])
    seen = place <= (rank * own + torch.arange(own))[:, None]
    scale, grouped = options["scaling"], query.shape[1] != keys.shape[1]
    y = F.scaled_dot_product_attention(query, keys, values, seen, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).contiguous(), None


AttentionInterface.register("ring", ring_attention)


def adapted(kind: str) -> nn.Module:
    """Return the model of one process; "norms" train beside the adapters."""
    model = whole_model("lora" if kind == "norms" else kind)
    for name, parameter in model.named_parameters():
        if kind == "norms" and "norm" in name:
            parameter.requires_grad_()
    return model


def task(rank: int, ranks: int, kind: str) -> dict[str, Any]:
    """Return this rank's part of the loss, and the gradients of all of it."""
    model = adapted(kind)
    if kind == "norms":
        norms = ["input_layernorm", "post_attention_layernorm"]
        names = ["model.norm", *(f"model.layers.*.{norm}" for norm in norms)]
        plan = {name: SequenceParallel(use_local_output=True) for name in names}
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), plan)
    model.set_attn_implementation("ring")
    own = LENGTH // ranks
    places = torch.arange(rank * own, (rank + 1) * own)[None]
    part = TOKENS[:, rank * own : (rank + 1) * own]
    after = F.pad(TOKENS, (0, 1), value=-100)[:, rank * own + 1 : (rank + 1) * own + 1]
    logits = model(input_ids=part, position_ids=places, use_cache=False).logits
    summed = F.cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="sum")
    loss = summed / (TOKENS.shape[0] * (LENGTH - 1))
    loss.backward()
    grads, norms = {}, 0
    for name, parameter in trained(model).items():
        grad = parameter.grad
        if isinstance(grad, DTensor):
            grads[name], norms = grad.full_tensor(), norms + 1
        else:
            dist.all_reduce(grad)
            grads[name] = grad
    return {"loss": loss.detach(), "gradients": grads, "rows": logits.shape[1], "norms": norms}


if __name__ == "__main__":
    processes.main(task)
