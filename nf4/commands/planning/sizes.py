"""Sizes of models: of well-known ones by name, of others by a transformers folder's config."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# By which a transformers config is known to be a decoder as below; qwen2 has biases on q, k and v,
# qwen3 norms of queries and keys
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder as Llama's: q, k, v, o, gate, up and down in each layer.

    Attributes:
        hidden: of the residual stream.
        intermediate: of the multilayer perceptron.
        layers: how many.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of each head.
        vocabulary: tokens.
        tied: whether the output layer is the embeddings.
        qkv_bias: whether q, k and v have biases.
        qk_norm: whether queries and keys are normalized per head.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The quantized weights of a layer: outputs and inputs by name."""
        h, i = self.hidden, self.intermediate
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (q, h),
            "k": (kv, h),
            "v": (kv, h),
            "o": (h, q),
            "gate": (i, h),
            "up": (i, h),
            "down": (h, i),
        }

    @property
    def vectors(self) -> tuple[int, ...]:
        """Sizes of what is dense in a layer: norms and biases."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = (q, kv, kv) if self.qkv_bias else ()
        norms = (self.head_dim, self.head_dim) if self.qk_norm else ()
        return (self.hidden, self.hidden, *biases, *norms)

    @property
    def tables(self) -> int:
        """Matrices ``[vocabulary, hidden]`` that stay dense: embeddings, an output layer."""
        return 1 if self.tied else 2

    @property
    def parameters(self) -> int:
        """Elements of all weights, as published."""
        layer = sum(n * k for n, k in self.linears.values()) + sum(self.vectors)
        return self.layers * layer + self.tables * self.vocabulary * self.hidden + self.hidden


_LLAMA_1B = Sizes(2048, 8192, 16, 32, 8, 64, 128256, tied=True)
_LLAMA_3B = Sizes(3072, 8192, 28, 24, 8, 128, 128256, tied=True)
_LLAMA_8B = Sizes(4096, 14336, 32, 32, 8, 128, 128256)
_LLAMA_70B = Sizes(8192, 28672, 80, 64, 8, 128, 128256)
_LLAMA_405B = Sizes(16384, 53248, 126, 128, 8, 128, 128256)

MODELS = {
    "llama-3-8b": _LLAMA_8B,
    "llama-3-70b": _LLAMA_70B,
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.1-70b": _LLAMA_70B,
    "llama-3.1-405b": _LLAMA_405B,
    "llama-3.2-1b": _LLAMA_1B,
    "llama-3.2-3b": _LLAMA_3B,
    "llama-3.3-70b": _LLAMA_70B,
    "mistral-7b": Sizes(4096, 14336, 32, 32, 8, 128, 32000),
    "qwen2.5-0.5b": Sizes(896, 4864, 24, 14, 2, 64, 151936, tied=True, qkv_bias=True),
    "qwen2.5-1.5b": Sizes(1536, 8960, 28, 12, 2, 128, 151936, tied=True, qkv_bias=True),
    "qwen2.5-3b": Sizes(2048, 11008, 36, 16, 2, 128, 151936, tied=True, qkv_bias=True),
    "qwen2.5-7b": Sizes(3584, 18944, 28, 28, 4, 128, 152064, qkv_bias=True),
    "qwen2.5-14b": Sizes(5120, 13824, 48, 40, 8, 128, 152064, qkv_bias=True),
    "qwen2.5-32b": Sizes(5120, 27648, 64, 40, 8, 128, 152064, qkv_bias=True),
    "qwen2.5-72b": Sizes(8192, 29568, 80, 64, 8, 128, 152064, qkv_bias=True),
    "qwen3-0.6b": Sizes(1024, 3072, 28, 16, 8, 128, 151936, tied=True, qk_norm=True),
    "qwen3-1.7b": Sizes(2048, 6144, 28, 16, 8, 128, 151936, tied=True, qk_norm=True),
    "qwen3-4b": Sizes(2560, 9728, 36, 32, 8, 128, 151936, tied=True, qk_norm=True),
    "qwen3-8b": Sizes(4096, 12288, 36, 32, 8, 128, 151936, qk_norm=True),
    "qwen3-14b": Sizes(5120, 17408, 40, 40, 8, 128, 151936, qk_norm=True),
    "qwen3-32b": Sizes(5120, 25600, 64, 64, 8, 128, 151936, qk_norm=True),
    "smollm2-135m": Sizes(576, 1536, 30, 9, 3, 64, 49152, tied=True),
    "smollm2-360m": Sizes(960, 2560, 32, 15, 5, 64, 49152, tied=True),
    "smollm2-1.7b": Sizes(2048, 8192, 24, 32, 32, 64, 49152, tied=True),
}
# Names without the number that only some sizes of Llama 3 have
ALIASES = {
    "llama-3-1b": "llama-3.2-1b",
    "llama-3-3b": "llama-3.2-3b",
    "llama-3-405b": "llama-3.1-405b",
    "llama-3.1-1b": "llama-3.2-1b",
    "llama-3.1-3b": "llama-3.2-3b",
}


def sizes_of(model: str) -> Sizes:
    """Return the sizes of a model.

    Args:
        model: a name of `MODELS` or `ALIASES`, a transformers folder, or its config.json.

    Raises:
        ValueError: there is neither, or the config is of another architecture or lacks a size.
    """
    name = model.lower()
    if name in MODELS or name in ALIASES:
        return MODELS[ALIASES.get(name, name)]
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model: expected one of {', '.join(MODELS)}, a transformers folder or a config.json, "
            f"got {model!r}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: expected JSON in {path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"model: expected an object in {path}, got {type(config).__name__}")
    return _of_config(config, path)


def _of_config(config: Mapping[str, Any], path: Path) -> Sizes:
    kind = config.get("model_type")
    if kind not in KNOWN:
        raise ValueError(
            f"model: expected a model_type of {', '.join(KNOWN)} in {path}, whose layers the "
            f"formulas are of, got {kind!r}"
        )
    hidden, heads = (_size(config, path, n) for n in ("hidden_size", "num_attention_heads"))
    kv_heads = _size(config, path, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"model: expected a number of attention heads that num_key_value_heads {kv_heads} "
            f"divides in {path}, got {heads}"
        )
    return Sizes(
        hidden,
        _size(config, path, "intermediate_size"),
        _size(config, path, "num_hidden_layers"),
        heads,
        kv_heads,
        _size(config, path, "head_dim", max(hidden // heads, 1)),
        _size(config, path, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
        qk_norm=kind == "qwen3",
    )


def _size(config: Mapping[str, Any], path: Path, name: str, default: int | None = None) -> int:
    """Return a size of a config; what is missing or null is the default, if there is one."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"model: expected a whole number from 1 for {name} in {path}, got {value}")
    return value
