"""Names of a package that are imported when they are first used, so that what needs no JAX does not wait for it.

A package's `__getattr__` and `__dir__` (PEP 562) call these; its imports under TYPE_CHECKING say the same to readers
and type checkers.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any


def get(package: str, modules: Mapping[str, str], name: str) -> Any:
    """Return a public name of a package, or one of its modules.

    Args:
      package: its `__name__`.
      modules: for each public name the module of the package that has it.
      name: what is asked for.

    Raises:
      AttributeError: the package has no such name.

    """
    if name in modules:
        value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value
    if name in _submodules(package):
        return importlib.import_module(f"{package}.{name}")
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def names(package: str, modules: Mapping[str, str]) -> list[str]:
    """Return the names of what a package has, and of what is imported when it is first used."""
    return sorted({*vars(sys.modules[package]), *modules, *_submodules(package)})


def _submodules(package: str) -> set[str]:
    return {module.name for module in pkgutil.iter_modules(sys.modules[package].__path__)}
