"""Layers that accelerate has given a device, as ``device_map`` does on several of them.

Their forward is one of their own, which moves what they are called with to their weights. A layer
that takes the place of one takes this on. Where weights are offloaded, there is nothing to replace.
"""

from itertools import chain
from types import MethodType
from typing import Any

from torch import nn


def placing_hook(layer: nn.Module) -> Any:
    """Return accelerate's hook that a layer's forward runs, if that is all its forward adds.

    Returns:
        None if there is none, if more has been put around the forward of the class, or if tensors
        of the layer are offloaded.
    """
    hook, beneath = vars(layer).get("_hf_hook"), vars(layer).get("_old_forward")
    outer = getattr(vars(layer).get("forward"), "__wrapped__", None)  # of what accelerate puts
    if hook is None or outer != beneath or beneath != MethodType(type(layer).forward, layer):
        return None
    offloaded = any(tensor.is_meta for tensor in chain(layer.parameters(), layer.buffers()))
    return None if offloaded else hook


def place_as(new: nn.Module, old: nn.Module) -> None:
    """Let a layer run the hook of the one whose place it takes, if it has one."""
    hook = placing_hook(old)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module  # whose hook it is

        add_hook_to_module(new, hook)
