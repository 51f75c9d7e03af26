"""What version 0.1.0 called differently: old names work in this version, and warn."""

import importlib
import warnings
from collections.abc import Callable

# old module.name: new module.name
MOVED = {}


def moved(module: str) -> Callable[[str], object]:
    """Make `__getattr__` for a module of which names have moved."""
    package, _, here = module.rpartition(".")

    def __getattr__(name: str) -> object:
        new = MOVED.get(f"{here}.{name}")
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        text = f"{module}.{name} is {package}.{new} now"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        where, _, name = new.rpartition(".")
        return getattr(importlib.import_module(f"{package}.{where}"), name)

    return __getattr__
