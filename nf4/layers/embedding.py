"""EmbeddingNF4: a drop-in for ``torch.nn.Embedding`` with a frozen weight in 4-bit NormalFloat."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nf4.functional import dequantize, embedding, quantize, to_rows
from nf4.layers.module import QuantizedModule
from nf4.tensor import NF4Tensor, check_nf4


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module looks rows up, and at most scales them by one number."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return type(module).forward is nn.Embedding.forward or _is_scaled(module)


def _is_scaled(module: nn.Module) -> bool:
    """Return whether a module is one of transformers' embeddings times ``embed_scale``."""
    return type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")


class EmbeddingNF4(QuantizedModule):
    """A drop-in for ``torch.nn.Embedding`` with a frozen weight in 4-bit NormalFloat.

    Only the rows that are looked up are ever dense. The weight is held as in `LinearNF4`, always
    in rows. transformers' embeddings that are scaled by a number, as Gemma's, stay scaled.

    Args:
        source: the dense embedding; left unchanged.
        q: its quantized weight ``[num_embeddings, embedding_dim]``; shared, not copied.

    Raises:
        TypeError: source is no embedding that `is_embedding` knows, or q no NF4Tensor.
        ValueError: q has another shape than the weight of source.
    """

    def __init__(self, source: nn.Module, q: NF4Tensor) -> None:
        super().__init__()
        check_nf4(q)
        if not isinstance(source, nn.Embedding) or not is_embedding(source):
            raise TypeError(f"source: expected a torch.nn.Embedding, got {type(source).__name__}")
        if q.shape != source.weight.shape:
            raise ValueError(
                f"q: expected shape {tuple(source.weight.shape)}, got {tuple(q.shape)}"
            )
        self.num_embeddings, self.embedding_dim = source.weight.shape
        self.padding_idx = source.padding_idx
        self.embed_scale, self.rounds_scale = _scale_of(source)
        # What `to_embedding` gives back, without its weight and hooks; no part of the model
        weight = nn.Parameter(torch.empty_like(source.weight, device="meta"))
        memo: dict[int, Any] = {id(source.weight): weight}
        memo |= {id(v): type(v)() for k, v in vars(source).items() if "_hooks" in k and v}
        self.__dict__["skeleton"] = copy.deepcopy(source, memo)
        self._set_weight(q)
        self.train(source.training)

    @classmethod
    def from_embedding(
        cls,
        source: nn.Module,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        scale: str = "absmax",
    ) -> "EmbeddingNF4":
        """Quantize a ``torch.nn.Embedding``.

        Args:
            source: the embedding; left unchanged.
            block_size: elements that share one scale.
            double_quant: quantize the scales to 8 bits too.
            scale: how scales are found, see `nf4.quantize`.

        Raises:
            TypeError: source is of another kind, or has max_norm or a forward of its own.
            ValueError: the weight holds NaN or an infinity, or scale is not known.
        """
        if not isinstance(source, nn.Embedding) or not is_embedding(source):
            raise TypeError(
                "source: expected a torch.nn.Embedding without max_norm, "
                f"got {type(source).__name__}"
            )
        q = quantize(source.weight, block_size, double_quant, scale=scale, check=True)
        return cls(source, q)

    @property
    def _weight_shape(self) -> torch.Size:
        return torch.Size((self.num_embeddings, self.embedding_dim))

    def _choose_layout(self) -> None:
        """Hold the weight in rows, also one that was shared by a layer in another order."""
        if self.layout != "rows":
            self._hold(to_rows(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows, `dtype` ``[*input.shape, embedding_dim]``."""
        rows = embedding(input, self.weight)
        if self.embed_scale is None:
            return rows
        if not self.rounds_scale:
            return rows * self.embed_scale
        return rows * torch.tensor(self.embed_scale, dtype=rows.dtype, device="cpu")

    def to_embedding(self, weight: nn.Parameter | None = None) -> nn.Embedding:
        """Return the dense embedding, of the class that was quantized.

        Args:
            weight: what to take instead of the dequantized weight, of the same shape and dtype.
        """
        dense: Any = copy.deepcopy(self.__dict__["skeleton"])
        dense.weight = nn.Parameter(dequantize(self.weight)) if weight is None else weight
        if isinstance(getattr(dense, "embed_scale", None), Tensor):
            dense.embed_scale = torch.tensor(self.embed_scale, device=dense.weight.device)
        embedding: nn.Embedding = dense.train(self.training)
        return embedding

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "nf4_is_embedding": True}

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}, dtype={self.dtype}"
        )


def _scale_of(source: Any) -> tuple[float | None, bool]:
    """Return the factor of an embedding, and whether it is rounded to the weight's dtype first.

    So is a tensor, as Gemma has it, not the number that BART has.
    """
    if not _is_scaled(source):
        return None, False
    scale = getattr(source, "scalar_embed_scale", source.embed_scale)
    return float(scale), isinstance(source.embed_scale, Tensor)
