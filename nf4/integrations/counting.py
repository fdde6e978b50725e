"""How many parameters a model has: 4-bit weights count by their elements, not their bytes."""

from typing import Any

from nf4.layers.embedding import EmbeddingNF4
from nf4.layers.module import QuantizedModule
from nf4.tensor import PARTS


def uncounted(model: Any, embeddings: bool = True) -> int:
    """Return how many elements 4-bit weights have beyond those of the parameters that hold them.

    Args:
        model: any module; a weight that several layers share counts once.
        embeddings: whether those of embeddings count; if not, what holds them is taken off.
    """
    if hasattr(model, "get_base_model"):  # PEFT's, whose ties are named within its base
        model = model.get_base_model()
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    # On a GPU a tied output layer holds the weight once more, in the order of tensor cores
    others = {id(model.get_submodule(n.rpartition(".")[0])) for n in ties if n.endswith(".packed")}
    found, seen = 0, set()
    for module in model.modules():
        if not isinstance(module, QuantizedModule) or id(module.packed) in seen:
            continue
        seen.add(id(module.packed))
        found -= sum(p.numel() for p in map(module._parameters.get, PARTS) if p is not None)
        again = id(module) in others and module.layout != "rows"
        if not again and (embeddings or not isinstance(module, EmbeddingNF4)):
            found += module.weight.numel()
    return found
