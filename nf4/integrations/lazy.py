"""Do something as soon as a framework is imported, such as import an integration, never before.

``import nf4`` costs nothing of a framework that is not used, and whoever uses one needs no second
import. A finder at the front of ``sys.meta_path`` waits for the framework's module; once that has
been executed it does what is to be done, and steps aside.
"""

import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Waiting(MetaPathFinder):
    """Finds the modules that are waited for, as the other finders do."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[], None]] = {}
        self._asking = threading.local()  # this thread asks the other finders

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that other finders have, its loader going on to what is to be done.

        Whoever asks may only want to know whether the module is there.
        """
        if name not in self.actions or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, name)
        return spec


class _Then(Loader):
    """Loads a module as its own loader does, and does what is to be done afterwards."""

    def __init__(self, loader: Any, framework: str) -> None:
        self._loader, self._framework = loader, framework

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, which keeps no trace of this loader, and go on."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        action = _WAITING.actions.pop(self._framework, None)
        if action is not None:
            action()

    def __getattr__(self, name: str) -> Any:
        """Answer what others ask a loader as its own one does."""
        return getattr(self._loader, name)


_WAITING = _Waiting()


def when_imported(framework: str, action: Callable[[], None]) -> None:
    """Call a function when a module of a framework has been imported; now if it has been.

    Args:
        framework: name of the module.
        action: is called once.
    """
    if framework in sys.modules:
        action()
        return
    if _WAITING not in sys.meta_path:
        sys.meta_path.insert(0, _WAITING)
    _WAITING.actions[framework] = action


def import_with(framework: str, integration: str) -> None:
    """Import an integration when a module of a framework has been imported; now if it has been.

    Args:
        framework: name of the module.
        integration: name of a module of this package.
    """
    when_imported(framework, partial(_import, integration))


def _import(integration: str) -> None:
    try:
        importlib.import_module(integration)
    except ImportError as error:  # a version of the framework that nf4 does not know
        warnings.warn(f"nf4: {integration} could not be imported: {error}", stacklevel=2)
