"""Let layers that share an input multiply a row together: a query, a key and a value."""

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from nf4.layers.group import join, leave
from nf4.models.quantize import check_model

Model = TypeVar("Model", bound=nn.Module)
# Names that layers of one input have in models of transformers
PROJECTIONS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
MOST = 3  # layers of a group


def fuse_projections(model: Model, projections: Sequence[Sequence[str]] = PROJECTIONS) -> Model:
    """Let layers that are given one input multiply one or two rows of it in one launch.

    A token of a Llama takes 4 launches a layer instead of 7, with adapters 8 instead of 14. The
    layers stay what they are, with their weights, adapters, files and results, bit for bit: the
    first of a group that is called on a GPU without gradients computes the others too, and those
    return what was computed if they are given the same tensor; if they are not asked, each layer is
    soon computed alone. What is saved, merged or copied is not fused. Adapters that are put on a
    model later replace its layers: fuse them again.

    Args:
        model: a module with `LinearNF4` layers, with or without adapters, PEFT's included.
        projections: names of two or three layers within one module that are given one input.

    Returns:
        The model.

    Raises:
        TypeError: model is no module, or projections no names.
        ValueError: projections are not two or three different names each, or the model has none.
    """
    check_model(model)
    names = _checked(projections)
    groups = []
    for parent in model.modules():
        for group in names:
            found = [parent._modules.get(name) for name in group]
            layers = [layer for layer in found if layer is not None and hasattr(layer, "alone")]
            if len(layers) == len(group):
                groups.append(layers)
    if not groups:
        wanted = "; ".join(", ".join(group) for group in names)
        raise ValueError(
            f"model: expected 4-bit layers of one input, named {wanted}, got none in "
            f"{type(model).__name__}"
        )
    for group_ in groups:
        join(group_)
    return model


def unfuse_projections(model: Model) -> Model:
    """Let each layer multiply by itself again: undoes `fuse_projections`.

    Raises:
        TypeError: model is no module.
        ValueError: no layers of the model are fused.
    """
    check_model(model)
    if not sum([leave(module) for module in model.modules()]):
        raise ValueError(
            f"model: expected one of `nf4.fuse_projections`, got {type(model).__name__} without "
            "fused layers"
        )
    return model


def _checked(projections: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    if isinstance(projections, str) or not isinstance(projections, Sequence):
        raise TypeError(f"projections: expected lists of names, got {projections!r}")
    found = []
    for group in projections:
        if isinstance(group, str) or not isinstance(group, Sequence):
            raise TypeError(f"projections: expected a list of names, got {group!r}")
        if not all(isinstance(name, str) for name in group):
            raise TypeError(f"projections: expected names, got {group!r}")
        if not 2 <= len(set(group)) == len(group) <= MOST:
            raise ValueError(f"projections: expected two or three different names, got {group!r}")
        found.append(tuple(group))
    return found
