"""What is planned: a model, GPUs, and how they train; checked once."""

import math
import re
from dataclasses import dataclass, field

from nf4.commands.planning.sizes import Sizes
from nf4.tools.devices import DEVICES, Device

# As in nf4/codebook.py, which needs PyTorch; tests/commands/test_plan.py holds these to it
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ABSMAX_BLOCK_SIZE = 256

METHODS = {
    "ddp": "every GPU holds the whole model and its own sequences",
    "fsdp": "every GPU holds a share of each layer, gathered when needed, and its own sequences",
    "tp": "every GPU computes a part of each product of the same sequences",
}
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes
ATTENTIONS = ("sdpa", "eager")
NODE = 8  # GPUs that NVLink joins
# Bytes per second that one GPU sends: two thirds of NVLink 4's 450 GB/s a direction, and four
# fifths of an InfiniBand port of 400 Gbit/s, one for each GPU
NVLINK, NETWORK = 300e9, 40e9
_UNITS = {"": 1e9, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how.

    Attributes:
        sizes: of the model.
        gpus: how many.
        memory: of each, bytes.
        method: "ddp", "fsdp" or "tp".
        batch: sequences in a step: of each GPU, under tp of all GPUs together.
        length: tokens of a sequence.
        rank: r of the adapters.
        optimizer: "adamw", "adamw8bit" or "sgd".
        checkpointing: whether layers are computed again in the backward pass.
        double_quant: whether the scales of weights are quantized.
        block_size: weights that share a scale.
        dtype: of products and of what stays dense: "bf16", "fp16" or "fp32".
        attention: "sdpa", which does not keep scores, or "eager", which does.
        reserve: bytes of each GPU that are left to CUDA, NCCL and gaps between tensors.
        bandwidth: bytes per second that a GPU sends to others; None for a default.
        device: of which the time is modelled.
    """

    sizes: Sizes
    gpus: int
    memory: float
    method: str = "fsdp"
    batch: int = 1
    length: int = 2048
    rank: int = 16
    optimizer: str = "adamw"
    checkpointing: bool = False
    double_quant: bool = True
    block_size: int = 64
    dtype: str = "bf16"
    attention: str = "sdpa"
    reserve: float = 2e9
    bandwidth: float | None = None
    device: Device = field(default_factory=lambda: device_named("H100"))

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be."""
        for name in ("gpus", "batch", "length", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected a whole number from 1, got {getattr(self, name)}"
                )
        for name, known in (
            ("method", METHODS),
            ("optimizer", OPTIMIZERS),
            ("block_size", BLOCK_SIZES),
            ("dtype", DTYPES),
            ("attention", ATTENTIONS),
        ):
            if getattr(self, name) not in known:
                listed = ", ".join(str(one) for one in known)
                raise ValueError(f"{name}: expected one of {listed}, got {getattr(self, name)!r}")
        if self.method == "tp":
            self._check_parts()

    def _check_parts(self) -> None:
        """Raise unless heads and blocks of scales divide among GPUs."""
        s = self.sizes
        if s.kv_heads % self.gpus:
            raise ValueError(
                f"gpus: expected a number that divides the model's {s.kv_heads} heads of keys and "
                f"values under tp, got {self.gpus}"
            )
        for name in ("o", "down"):
            k = s.linears[name][1]
            if k % (self.gpus * self.block_size):
                raise ValueError(
                    f"gpus: expected whole blocks of {self.block_size} weights on each GPU under "
                    f"tp, got {self.gpus} parts of the {k} inputs of {name}"
                )

    @property
    def link(self) -> float:
        """Bytes per second that a GPU sends to others."""
        return self.bandwidth or (NVLINK if self.gpus <= NODE else NETWORK)

    @property
    def tokens(self) -> int:
        """Tokens of a step on all GPUs."""
        replicas = 1 if self.method == "tp" else self.gpus
        return replicas * self.batch * self.length


def parse_bytes(text: str, name: str) -> float:
    """Return bytes of text such as 80GB, 79.6GiB or 80, which are GB (1e9).

    Raises:
        ValueError: text is no size above 0.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = {**_UNITS, **_BINARY}.get(found[2].upper()) if found else None
    value = float(found[1]) * unit if found and unit else 0.0
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a size such as 80GB or 79.6GiB, got {text!r}")
    return value


def parse_bandwidth(text: str) -> float:
    """Return bytes per second of text such as 300GB/s, 300 or 400Gbit/s.

    Raises:
        ValueError: text is no bandwidth above 0.
    """
    bits = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*Gb(?:it/s|ps)\s*", text)
    if bits and float(bits[1]) > 0:
        return float(bits[1]) * 1e9 / 8
    try:
        return parse_bytes(text.strip().removesuffix("/s"), "bandwidth")
    except ValueError:
        raise ValueError(
            f"bandwidth: expected one such as 300GB/s or 400Gbit/s, got {text!r}"
        ) from None


def device_named(name: str) -> Device:
    """Return the model of a GPU.

    Raises:
        ValueError: it is not known.
    """
    for known in DEVICES:
        if known.name.lower() == name.lower():
            return known
    listed = ", ".join(known.name for known in DEVICES)
    raise ValueError(f"device: expected one of {listed}, got {name!r}")
