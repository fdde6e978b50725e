"""What puts each kind of adapter on a model: every file here is found, and its kind then known."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
