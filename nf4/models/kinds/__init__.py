"""The kinds of adapters, a file each: what this folder holds is found, and known by its files."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
