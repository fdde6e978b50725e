"""Which layers of a model are meant: those to quantize, those to leave, and why."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from nf4.layers.embedding import is_embedding
from nf4.layers.experts import PARTS as EXPERT_PARTS
from nf4.layers.experts import is_experts
from nf4.layers.linear import dense_weight, is_conv1d, is_linear
from nf4.models.readers import READ_BY_ATTENTION, read_layers
from nf4.ops.checks import check_names, compile_pattern

DEFAULT_SKIP = ("lm_head",)


def check_skip_modules(skip_modules: str | Iterable[str]) -> str | tuple[str, ...]:
    """Return a regular expression, or names as a tuple; raise if it is neither."""
    if not isinstance(skip_modules, str):
        return check_names(skip_modules, "skip_modules")
    if skip_modules.startswith("+"):
        return (skip_modules,)
    compile_pattern(skip_modules, "skip_modules")
    return skip_modules


def resolve_skip(
    skip_modules: str | Iterable[str] | None, default: Iterable[str] = DEFAULT_SKIP
) -> str | tuple[str, ...]:
    """Return what is left dense: what was given in the place of the default, or added to it.

    Args:
        skip_modules: None for the default, a regular expression, or names. Names that all start
            with a plus are added to the default; others replace it.
        default: names.

    Raises:
        TypeError: skip_modules are no names.
        ValueError: some names have a plus and others none, or skip_modules is no expression.
    """
    if skip_modules is None:
        return tuple(default)
    found = check_skip_modules(skip_modules)
    if isinstance(found, str) or not any(name.startswith("+") for name in found):
        return found
    plain = [name for name in found if not name.startswith("+")]
    if plain:
        raise ValueError(
            "skip_modules: expected names that replace the default, or names with a plus that are "
            f"added to it, got both: {', '.join(found)}"
        )
    added = [name.removeprefix("+") for name in found]
    return tuple(dict.fromkeys((*default, *added)))


def warn_of_skipped(
    model: nn.Module,
    skip: str | tuple[str, ...],
    default: Iterable[str],
    embeddings: bool = False,
    experts: bool = True,
    stacklevel: int = 3,
) -> None:
    """Warn of names to skip that no module has, and of layers that are left dense besides.

    Args:
        model: with dense layers.
        skip: as `resolve_skip` returns it.
        default: names that need not be there.
        embeddings: whether those of tokens are quantized.
        experts: whether experts of a mixture are.
        stacklevel: of the caller that is to be named.
    """
    names = [n for n, _ in model.named_modules(remove_duplicate=False)]
    names += [n for n, _ in model.named_parameters()]  # transformers leaves some of them alone
    warn_of_unmatched(names, skip, (*DEFAULT_SKIP, *default), stacklevel + 1)
    left = _left_dense(model, skip, embeddings, experts)
    if left:
        warnings.warn(f"{type(model).__name__}: left dense are {left}", stacklevel=stacklevel)


def warn_of_unmatched(
    names: Iterable[str],
    skip_modules: str | tuple[str, ...],
    default: Iterable[str] = DEFAULT_SKIP,
    stacklevel: int = 3,
) -> None:
    """Warn of names to skip that no module has, but for those of the default.

    Args:
        names: of all modules, or of all weights.
        skip_modules: as `resolve_skip` returns it.
        default: names that need not be there.
        stacklevel: of the caller that is to be named.
    """
    names = list(names)
    asked = [skip_modules] if isinstance(skip_modules, str) else [*skip_modules]
    missed = [
        repr(one)
        for one in asked
        if one not in tuple(default)
        and not any(is_below(n, one if isinstance(skip_modules, str) else [one]) for n in names)
    ]
    if missed:
        warnings.warn(
            f"skip_modules: no module is called {', '.join(missed)}; nothing is left dense by it",
            stacklevel=stacklevel,
        )


def is_below(name: str, skip: str | Iterable[str]) -> bool:
    """Return whether a name, or that of a module it is inside of, is one of those to skip."""
    parts = name.split(".")
    if isinstance(skip, str):
        ends = range(1, len(parts) + 1)
        return any(re.fullmatch(skip, ".".join(parts[:end])) for end in ends)
    return any(
        parts[end - len(suffix) : end] == suffix
        for suffix in (s.split(".") for s in skip)
        for end in range(len(suffix), len(parts) + 1)
    )


def select_layers(
    model: nn.Module,
    skip_modules: str | Iterable[str] | None,
    embeddings: bool = False,
    default: Iterable[str] = DEFAULT_SKIP,
    stacklevel: int = 4,
) -> tuple[dict[str, nn.Module], str | tuple[str, ...]]:
    """Return the layers to quantize, by name, and what is skipped; warn of what users may miss.

    Args:
        model: with dense layers.
        skip_modules: see `resolve_skip`.
        embeddings: whether embeddings of tokens are to be quantized too.
        default: names that are skipped by default.
        stacklevel: of the caller that warnings are to name.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: skip_modules are no names, of layers that share a weight only one is skipped,
            or no layer is left; the message says which kinds of layers there are.
    """
    skip = resolve_skip(skip_modules, default)
    layers = dense_layers(model, skip, embeddings)
    if not layers:
        left = _left_dense(model, skip, embeddings)
        others = f"; not quantized are {left}" if left else ""
        raise ValueError(
            f"model: expected at least one nn.Linear or Conv1D to quantize, found none in "
            f"{type(model).__name__} (skip_modules={skip}){others}"
        )
    warn_of_skipped(model, skip, default, embeddings, stacklevel=stacklevel)
    return layers, skip


def _left_dense(
    model: nn.Module, skip: str | tuple[str, ...], embeddings: bool, experts: bool = True
) -> str:
    """Return in words which layers are not skipped, and yet not quantized."""
    read, wanted = read_layers(model), token_embeddings(model) if embeddings else set()
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if is_below(name, skip):
            continue
        meant = is_linear(module) or is_conv1d(module) or id(module) in wanted
        if meant and id(module) in read:
            found[f"{name.rpartition('.')[2]}, whose weight {read[id(module)]} reads"] += 1
        elif isinstance(module, nn.Linear) and not is_linear(module):
            found[f"{kind}, whose class has a forward of its own"] += 1
        elif is_experts(module) and not experts:
            found[f"{kind}, experts of a mixture"] += 1
        elif "Expert" in kind and not is_experts(module) and _has_three_dimensions(module):
            found[f"{kind}, which keep their weights in a form of their own"] += 1
    return "; ".join(f"{count} {what}" for what, count in found.items())


def _has_three_dimensions(module: nn.Module) -> bool:
    return any(p.ndim == 3 and p.is_floating_point() for p in module.parameters(recurse=False))


def dense_layers(
    model: nn.Module,
    skip_modules: str | Iterable[str],
    embeddings: bool = False,
    also_read: bool = False,
) -> dict[str, nn.Module]:
    """Return the linear layers and experts of a model that can be quantized, by name.

    Args:
        model: with dense layers.
        skip_modules: names, or a regular expression.
        embeddings: embeddings of tokens too.
        also_read: those too whose weight the code around them reads, see nf4/models/readers.py.

    Raises:
        TypeError: embeddings is no bool.
        ValueError: of an embedding and a layer that share a weight, only one is skipped.
    """
    if not isinstance(embeddings, bool):
        raise TypeError(f"quantize_embeddings: expected a bool, got {type(embeddings).__name__}")
    skip = check_skip_modules(skip_modules)
    modules = dict(model.named_modules(remove_duplicate=False))
    skipped = {id(module) for name, module in modules.items() if is_below(name, skip)}
    wanted = token_embeddings(model) if embeddings else set()
    if not also_read:
        skipped |= set(read_layers(model))
    layers = {
        name: module
        for name, module in modules.items()
        if (id(module) in wanted or is_linear(module) or is_conv1d(module) or is_experts(module))
        and not isinstance(module, READ_BY_ATTENTION)
        and all(weight.numel() for _, weight in dense_weights(module))
        and id(module) not in skipped
    }
    if wanted:
        _check_ties(modules, layers)
    return layers


def token_embeddings(model: nn.Module) -> set[int]:
    """Return the ids of the modules that `quantize_model` takes for embeddings of tokens."""
    get = getattr(model, "get_input_embeddings", None)
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and is_embedding(m)]
    if get is not None:
        try:
            weight = getattr(get(), "weight", None)
        except NotImplementedError:  # a transformers model of several towers
            return {id(m) for m in embeddings}
        embeddings = [m for m in embeddings if m.weight is weight]
    return {id(m) for m in embeddings}


def _check_ties(modules: dict[str, nn.Module], layers: dict[str, nn.Module]) -> None:
    """Raise unless what shares its weight with an embedding to quantize is to be quantized too."""
    embeddings = {id(m.weight): n for n, m in layers.items() if isinstance(m, nn.Embedding)}
    for name, module in modules.items():
        source = embeddings.get(id(getattr(module, "weight", None)))
        if source is not None and name not in layers:
            raise ValueError(
                f"{name}: expected to quantize it with {source}, whose weight it shares, but it is "
                "left out; leave it out of skip_modules, or let quantize_embeddings be False"
            )


def dense_weights(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the weights that are to be quantized of a dense layer or of experts, with names."""
    if is_experts(layer):
        return [(name, getattr(layer, name)) for name in EXPERT_PARTS]
    if isinstance(layer, nn.Embedding):
        return [("weight", layer.weight)]
    return [("weight", dense_weight(layer))]
