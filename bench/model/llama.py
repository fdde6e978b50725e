"""A random Llama for each contender of the end-to-end benchmark, and the memory that it needs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import nf4
from nf4.bench.model import contenders
from nf4.models.quantize import quantized_layers

R, LORA_ALPHA = 16, 32
# hidden, intermediate, layers, heads, key-value heads, vocabulary, output tied to embeddings.
# From 1b on: Llama 3.2 1B and Llama 3.1 8B
SIZES = {
    "tiny": (64, 192, 2, 4, 2, 320, False),
    "30m": (512, 1536, 8, 8, 4, 8192, False),
    "160m": (768, 3072, 12, 12, 12, 32000, False),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}


@dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
        size: name of `SIZES`.
        device: where.
        dtype: name of `contenders.DTYPES`: of the dense weights, and of products.
        rounds: training steps, and times that each batch is decoded.
        batch: sequences of a training step.
        length: tokens of a sequence.
        new_tokens: that are decoded for each row, at least 2.
        checkpointing: whether activations are computed again in backward.
        seed: of weights and tokens.
    """

    size: str
    device: str
    dtype: str = "bf16"
    rounds: int = 5
    batch: int = 1
    length: int = 128
    new_tokens: int = 32
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:  # noqa: D105  checks
        for name, least in (("rounds", 1), ("batch", 1), ("length", 2), ("new_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def make_model(name: str, options: Options) -> nn.Module:
    """Return a random Llama of a contender with adapters, the same weights for each.

    Layers are drawn and quantized one at a time: a dense model is never held by those in 4 bits.

    Args:
        name: of the contender.
        options: what is timed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SIZES[options.size]
    device, dtype = torch.device(options.device), contenders.DTYPES[options.dtype]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=0,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )
    with device:
        model = LlamaForCausalLM(config)
    _draw(model, options.seed, dtype)
    model.config.num_hidden_layers = layers
    for i in range(layers):
        with torch.device("meta"):
            layer = LlamaDecoderLayer(model.config, i)
        _draw(layer.to_empty(device=device), options.seed + 1 + i, dtype)
        model.model.layers.append(contenders.quantize(name, layer, dtype))
    if options.checkpointing:
        _enable_checkpointing(model)
    torch.manual_seed(options.seed)
    return contenders.adapt(name, model.requires_grad_(False), R, LORA_ALPHA)


def _enable_checkpointing(model: Any) -> None:
    """Have activations computed again in backward; transformers renamed the call in 5.23."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _draw(module: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Fill matrices with N(0, 0.02²), Llama's initial weights, and scales of norms with ones."""
    for p in module.parameters():
        p.data = p.data.to(dtype)
        if p.ndim > 1:
            generator = torch.Generator(p.device).manual_seed(seed)
            nn.init.normal_(p, std=0.02, generator=generator)
            seed += 1_000_003
        else:
            nn.init.ones_(p)


def tokens(options: Options) -> Tensor:
    """Return random tokens, int64 ``[batch, length]``, the same for each contender."""
    generator = torch.Generator().manual_seed(options.seed)
    vocabulary = SIZES[options.size][5]
    drawn = torch.randint(vocabulary, (options.batch, options.length), generator=generator)
    return drawn.to(options.device)


@contextmanager
def plain_products(model: nn.Module) -> Iterator[None]:
    """Compute the products of quantized layers by PyTorch while the block runs, adapters left out.

    They add nothing before they are trained.
    """
    layers: list[Any] = list(quantized_layers(model).values())

    def product(layer: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.linear(x, nf4.dequantize(layer.weight, x.dtype), layer.bias)

    for layer in layers:
        layer.forward = product(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def needed_bytes(options: Options) -> float:
    """Return the memory that the dense contender needs to train, rounded up."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SIZES[options.size]
    kv = hidden // heads * kv_heads
    size = contenders.DTYPES[options.dtype].itemsize
    linear = 2 * hidden * (hidden + kv) + 3 * hidden * intermediate
    embeddings = (1 if tied else 2) * vocabulary * hidden
    # fp32 weight, gradient and two moments
    adapters = 16 * R * (6 * hidden + 2 * (hidden + kv) + 3 * (hidden + intermediate))
    rows = options.batch * options.length
    # What autograd keeps of a layer: some 16 tensors of the stream's width and 8 of the MLP's
    layer = size * rows * (16 * hidden + 8 * intermediate)
    kept = layer + layers * size * rows * hidden if options.checkpointing else layers * layer
    logits = (size + 12) * rows * vocabulary
    return size * (layers * linear + embeddings) + layers * adapters + kept + logits


def free_bytes(device: torch.device) -> float:
    """Return the memory that may be used: of a GPU what is free, else half of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def largest_size(options: Options) -> str:
    """Return the name of the largest model that fits: on a CPU always a small one, for its time."""
    device = torch.device(options.device)
    if device.type != "cuda":
        return "30m"
    free = free_bytes(device)
    fitting = [s for s in SIZES if needed_bytes(replace(options, size=s)) <= free]
    return fitting[-1] if fitting else "tiny"
