"""What comes into the linear layers of a model, feature by feature: its second moment.

The squared error of a layer's output is, for features that are independent, the sum over them of
the squared error of their column of the weight times the mean of x^2: the diagonal of E[x x^T].
`nf4.quantize` takes it as ``weights`` in its search for scales.
Source: the same diagonal weighs errors in AWQ (https://arxiv.org/abs/2306.00978) and in importance
matrices of GGUF files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nf4.layers.experts import is_experts
from nf4.models.quantize import check_callback, check_model
from nf4.models.selection import DEFAULT_SKIP, select_layers


@torch.no_grad()
def collect_activation_stats(
    model: nn.Module,
    batches: Iterable[Any],
    skip_modules: str | Iterable[str] = DEFAULT_SKIP,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Run a model and return the mean square of what comes into each of its dense linear layers.

    The model runs in evaluation mode, without gradients, and is left as it was. Experts of a
    mixture are left out: what comes into each depends on where tokens are sent.

    Args:
        model: a module with dense layers, before `nf4.quantize_model`.
        batches: of input: each a tensor, a tuple of arguments, or a mapping of keyword arguments.
        skip_modules: names of modules to leave out, as for `nf4.quantize_model`.
        progress: called with the number of batches done after each.

    Returns:
        For each name of a layer that was called, float32 ``[in_features]`` on the layer's device,
        for ``weights=`` of `nf4.quantize_model`.

    Raises:
        TypeError: model is no module, or progress no function.
        ValueError: the model has no dense linear layer, there is no batch, no layer was called, or
            what came into one is NaN or infinite; the message names the layer.
    """
    check_model(model)
    check_callback(progress, "progress")
    selected, _ = select_layers(model, skip_modules)
    layers = {n: m for n, m in selected.items() if not is_experts(m)}
    if not layers:
        raise ValueError(
            f"model: expected dense linear layers, found none in {type(model).__name__}"
        )
    sums: dict[int, Tensor] = {}
    rows: dict[int, int] = {}

    def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        x = x.reshape(-1, x.shape[-1])
        squares = x.float().square().sum(dim=0).double()
        sums[id(layer)] = sums[id(layer)] + squares if id(layer) in sums else squares
        rows[id(layer)] = rows.get(id(layer), 0) + len(x)

    done = 0
    with evaluating(model), _watched(layers.values(), add):
        for done, batch in enumerate(batches, start=1):
            _call(model, batch)
            if progress is not None:
                progress(done)
    if not done:
        raise ValueError("batches: expected at least one, got none")
    found = {
        name: (sums[id(layer)] / rows[id(layer)]).float().to(_device(layer))
        for name, layer in layers.items()
        if rows.get(id(layer))
    }
    if not found:
        raise ValueError("batches: expected some that reach the linear layers, none was called")
    for name, stats in found.items():
        if not stats.isfinite().all():
            raise ValueError(f"{name}: expected finite input, got NaN or an infinity")
    return found


def _device(layer: nn.Module) -> torch.device | None:
    """Return where a layer's weight is; None if it is offloaded."""
    weight: Any = layer.weight
    return None if weight.is_meta else weight.device


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


@contextmanager
def _watched(layers: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Call a hook before each layer while the block runs."""
    distinct = {id(layer): layer for layer in layers}.values()
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in distinct]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode while the block runs, and back module by module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
