"""Other starts of an adapter than PEFT's usual one, for a base in four bits: PiSSA and LoftQ.

PiSSA: s B A is the best approximation of rank r of W, and the base what is left, quantized:
the adapter trains the directions in which W is largest, in full precision.
LoftQ: s B A is the best approximation of rank r of W - Q, which quantization lost, so that the
first output is nearer to the dense layer's. One alternation of the paper's, as in PEFT's
``replace_lora_weights_loftq``: the base stays the quantized W, and adapters fit any copy of it.
Sources: PiSSA (https://arxiv.org/abs/2404.02948, section 3); LoftQ
(https://arxiv.org/abs/2310.08659, algorithm 1).
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nf4.functional import dequantize, quantize
from nf4.layers.linear import LinearNF4
from nf4.tensor import NF4Tensor
from nf4.tools.shards import Shards

INITIALIZATIONS = ("pissa", "loftq")
Source = Callable[[str], Tensor]
_FAR = 0.5  # of the norm; quantization moves a weight by 0.1, another weight is 1.4 away


@dataclass(frozen=True, eq=False)
class Start:
    """A base and an adapter that belong together; ``lora_A``, ``lora_B`` float32."""

    q: NF4Tensor
    lora_A: Tensor
    lora_B: Tensor


@torch.no_grad()
def initialize(kind: str, q: NF4Tensor, dense: Tensor | None, r: int, scaling: float) -> Start:
    """Return how an adapter starts, and the base for it.

    Args:
        kind: "pissa" or "loftq".
        q: quantized W ``[N, K]``.
        dense: floating W before quantization, which loftq needs; dequantized q by default.
        r: rank, at most min(N, K).
        scaling: s.

    Raises:
        ValueError: r is larger than the rank of W can be.
    """
    check_rank(r, q, kind)
    w = dequantize(q, torch.float32)
    if dense is not None:
        found, w = w, dense.to(w)
    if kind == "loftq":
        return Start(q, *_low_rank(w - found, r, scaling))
    lora_A, lora_B = _low_rank(w, r, scaling)
    residual = torch.addmm(w, lora_B, lora_A, alpha=-scaling).to(q.dtype)
    return Start(quantize(residual, q.block_size, q.double_quant), lora_A, lora_B)


def check_rank(r: int, q: NF4Tensor, kind: str) -> None:
    """Raise ValueError unless a weight has r singular vectors."""
    n, k = q.shape
    if r > min(n, k):
        raise ValueError(f"r: expected at most {min(n, k)} for {kind} on a weight {n}x{k}, got {r}")


def _low_rank(w: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A ``[r, K]`` and B ``[N, r]``: s B A is nearest to w, and A, B are of one size."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def dense_source(
    original: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | None,
    layers: Mapping[str, LinearNF4],
    needed: bool,
) -> Source | None:
    """Return what finds the dense weight of a layer by its name, having checked all of them.

    Args:
        original: the dense model, its state dict, a folder of safetensors or one such file.
            Weights of transformers' Conv1D are turned.
        layers: whose weights will be wanted.
        needed: whether original may not be None.

    Raises:
        TypeError: original is of another kind.
        ValueError: original is None though needed, a file is corrupt, or a weight is missing, has
            another shape, or is not what was quantized.
        FileNotFoundError: there is no such folder, or no safetensors in it.
    """
    if original is None:
        if needed:
            raise ValueError("original: expected the weights before quantization, got None")
        return None
    if isinstance(original, nn.Module):
        get = _of_tensors(original.state_dict(keep_vars=True))
    elif isinstance(original, Mapping):
        get = _of_tensors(original)
    elif isinstance(original, str | os.PathLike):
        get = _of_files(Path(original))
    else:
        raise TypeError(
            "original: expected a dense model, a state dict or a folder, "
            f"got {type(original).__name__}"
        )

    def weight(name: str) -> Tensor:
        return _like(get(f"{name}.weight" if name else "weight"), layers[name].weight, name)

    for name in layers:
        weight(name)
    layers = dict(layers)  # the caller's may lose them
    return weight


def _like(dense: Tensor, q: NF4Tensor, name: str) -> Tensor:
    """Return a dense weight the way round that q has it, or raise if it is another weight."""
    quantized = dequantize(q, torch.float32)
    if sorted(dense.shape) != sorted(q.shape) or dense.ndim != 2:
        raise ValueError(
            f"original: expected shape {tuple(q.shape)} of {name}.weight, got {tuple(dense.shape)}"
        )
    ways = [w.to(quantized) for w in (dense.detach(), dense.detach().T) if w.shape == q.shape]
    errors = [(w - quantized).norm().item() for w in ways]
    error = min(errors)
    if not error <= _FAR * quantized.norm().item():
        raise ValueError(
            f"original: expected in {name}.weight what was quantized, got another weight: it is "
            f"{error / max(quantized.norm().item(), 1e-38):.2f} of the norm away"
        )
    return ways[errors.index(error)]


def _of_tensors(tensors: Mapping[str, Tensor]) -> Source:
    def get(key: str) -> Tensor:
        if not isinstance(tensors.get(key), Tensor):
            raise ValueError(f"original: expected a weight {key!r}, found none")
        return tensors[key]

    return get


def _of_files(path: Path) -> Source:
    """Return what reads one tensor at a time from a safetensors file or from a folder of them."""
    if path.is_file():
        shards = Shards(path.parent, Shards.header(path.parent, path.name), indexed=False)
    elif path.is_dir():
        shards = Shards.read(path)
    else:
        raise FileNotFoundError(f"original: expected safetensors, found none at {path}")

    def get(key: str) -> Tensor:
        if key not in shards.tensors:
            raise ValueError(f"{path}: expected a weight {key!r}, found none")
        return shards.tensor(key)

    return get
