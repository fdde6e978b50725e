"""The contenders of the end-to-end benchmarks: nf4, bitsandbytes with PEFT, and dense with PEFT.

Each is made by its public interface, from the same dense layers and with the same options: NF4 in
blocks of 64 with double quantization, a LoRA adapter in fp32 on every linear layer but lm_head.
"""

import argparse
import importlib.util
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import nf4
from nf4.models.selection import dense_layers
from nf4.tools.training import trainable

# What is timed, by the names in files; ours is checked against those before it
LABELS = {"dense": "dense + PEFT", "bitsandbytes": "bitsandbytes + PEFT", "nf4": "nf4"}
_NEEDED = {"dense": ("peft",), "bitsandbytes": ("bitsandbytes", "peft"), "nf4": ()}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def missing(name: str) -> str | None:
    """Return why a contender cannot run here, or None if its packages are installed."""
    absent = [p for p in _NEEDED[name] if importlib.util.find_spec(p) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def quantize(name: str, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Quantize the linear layers of a model or of a part of it in place; dense ones stay dense.

    Args:
        name: of the contender.
        model: with dense layers, on the device where it will run.
        dtype: in which bitsandbytes computes.

    Raises:
        RuntimeError: bitsandbytes left a weight dense.
    """
    if name == "nf4":
        return nf4.quantize_model(model)
    if name == "bitsandbytes":
        return _quantize_with_bitsandbytes(model, dtype)
    return model


def _quantize_with_bitsandbytes(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace each nn.Linear by Linear4bit, whose documentation has ``.to`` quantize it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    how = {"quant_type": "nf4", "compress_statistics": True}
    layers = dense_layers(model, ("lm_head",))
    for name in list(layers):
        old: Any = layers.pop(name)
        device, (n, k) = old.weight.device, old.weight.shape
        new = Linear4bit(k, n, old.bias is not None, compute_dtype=dtype, device="meta", **how)
        new.weight = Params4bit(old.weight.data, requires_grad=False, module=new, **how)
        new.bias = old.bias
        new = new.to(device)
        if new.weight.dtype != torch.uint8 or new.weight.quant_state is None:
            raise RuntimeError(f"{name}: expected Linear4bit.to({device}) to quantize the weight")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def adapt(name: str, model: nn.Module, r: int, lora_alpha: int) -> nn.Module:
    """Add a LoRA adapter to every linear layer but lm_head, ready to train.

    Args:
        name: of the contender.
        model: a transformers model, as `quantize` left it.
        r: rank.
        lora_alpha: numerator of the scaling.
    """
    if name == "nf4":
        return nf4.add_lora(model, r=r, lora_alpha=lora_alpha, target_modules="all-linear").train()
    from peft import LoraConfig, get_peft_model

    if name == "bitsandbytes":  # as from_pretrained leaves it: PEFT then takes its own 4-bit layer
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    config = LoraConfig(r=r, lora_alpha=lora_alpha, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(model, config)
    return adapted.train()


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return AdamW over the adapters."""
    return torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0)


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return autocast to 16 bits, as the Trainer's ``bf16=True`` has it; nothing for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def train_step(
    model: nn.Module, batch: Tensor, optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> None:
    """Run forward, backward and the optimizer."""
    backward(model, batch, dtype)
    optimizer.step()
    optimizer.zero_grad()


def backward(model: nn.Module, batch: Tensor, dtype: torch.dtype) -> Any:
    """Run forward and backward, and return what the model returned, loss and logits.

    Args:
        model: a causal language model in training mode.
        batch: int64 ``[batch, length]``, its own labels.
        dtype: in which products are computed.
    """
    with computing_in(dtype, batch.device):
        out = model(batch, labels=batch, use_cache=False)
    out.loss.backward()
    return out


def check_gradients(model: nn.Module) -> None:
    """Raise unless every adapter got a gradient: a step that trains nothing is not timed.

    Of lora_A it is zero while lora_B is, as both begin.
    """
    for name, p in model.named_parameters():
        if p.requires_grad:
            given = p.grad
            good = given is not None and bool(given.isfinite().all())
            if given is None or not good or ("lora_B" in name and not given.any()):
                raise ValueError(f"{name}: expected a gradient, got none or zeros; not timed")


def generate(model: nn.Module, prompt: Tensor, new_tokens: int, criteria: Iterable[Any]) -> Tensor:
    """Decode greedily, always the same number of tokens.

    Args:
        model: a transformers model, with PEFT's around it or not, in evaluation mode.
        prompt: int64 ``[batch, T]``.
        new_tokens: for each row.
        criteria: functions that are called after each token, and return which rows are done.

    Returns:
        int64 ``[batch, T + new_tokens]``.
    """
    from transformers import StoppingCriteriaList

    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    base.generation_config.eos_token_id = None
    with torch.no_grad():
        out: Tensor = base.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList(criteria),
        )
    if out.shape != (prompt.shape[0], prompt.shape[1] + new_tokens):
        raise ValueError(f"generate: expected {new_tokens} new tokens, got {tuple(out.shape)}")
    return out


def positive(text: str) -> int:
    """Return an argument of the shell as an int of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return int(text)
