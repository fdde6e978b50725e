"""Frameworks whose models hold this package's layers: they are told when layers change.

A module of nf4/integrations/ puts a `Host` into `HOSTS` when it is imported, which happens as soon
as its framework is: nothing here knows one by name.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn


class Host(Protocol):
    """What a framework has to know of its models."""

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if layers of a model must not be quantized, before any is."""

    def changed(self, model: nn.Module, form: Mapping[str, Any]) -> None:
        """Learn that layers of a model have been quantized, adapted, merged or made dense.

        Args:
            model: any module.
            form: how they were quantized, by names of `nf4.quantize_model`'s options; or empty.
        """


HOSTS: list[Host] = []


def check_hosts(model: nn.Module) -> None:
    """Raise ValueError if the framework of a model does not let layers of it be quantized."""
    for host in HOSTS:
        host.check(model)


def tell_hosts(model: nn.Module, **form: Any) -> None:
    """Tell frameworks that layers of a model have changed."""
    for host in HOSTS:
        host.changed(model, form)
