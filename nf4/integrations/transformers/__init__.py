"""Quantize transformers' models while they load, save them, and open them again.

    import nf4.integrations.transformers as nf4_hf
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=nf4_hf.NF4Config())
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

Importing this module makes the method "nf4" known to transformers, which must have happened before
such a folder is opened. Weights are quantized one by one as they arrive, on the device that they
are meant for: memory holds the 4-bit model and a tensor. transformers 5.17 and newer.
"""

from nf4.integrations.transformers import (
    architectures,
    counting,
    host,
    parallel,
    resizing,
    saving,
    ties,
)
from nf4.integrations.transformers.config import METHOD, NF4Config
from nf4.integrations.transformers.quantizer import NF4Quantizer

__all__ = ["METHOD", "NF4Config", "NF4Quantizer"]

host.install()
architectures.install()
saving.install()
resizing.install()
counting.install()
parallel.install()
ties.install()
