"""What torch.library sees: a file an operator, and how they are registered, checked and chosen.

quantize, quantize_absmax, dequantize, embedding, repack, linear, scaled_linear and lora_linear are
operators, with schema, compute, fake and gradient together; weight.py says how a quantized weight
stands in their schemas, registry.py how they are called, products.py how layers call them,
checks.py what users may pass, choice.py what multiplies, and replay.py how launches are repeated.
"""

from nf4.ops import (
    dequantize,
    embedding,
    linear,
    lora_linear,
    quantize,
    quantize_absmax,
    repack,
    scaled_linear,
)

__all__ = [
    "dequantize",
    "embedding",
    "linear",
    "lora_linear",
    "quantize",
    "quantize_absmax",
    "repack",
    "scaled_linear",
]
