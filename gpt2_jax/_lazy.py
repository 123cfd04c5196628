"""Lazy imports: the public names of a package are imported when they are first used.

So code that does not need JAX does not wait for its import. `attach` returns the package's `__getattr__` and `__dir__`
(PEP 562). The package's imports under TYPE_CHECKING declare the same names to readers and type checkers.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package. They import its public names and modules on first use.

    Args:
      package: the package's `__name__`.
      modules: {public name: the module of the package that defines it}.
    """

    def get(name: str) -> Any:
        if name in modules:
            value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if name in submodules():
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules, *submodules()})

    def submodules() -> set[str]:
        return {module.name for module in pkgutil.iter_modules(sys.modules[package].__path__)}

    return get, names
