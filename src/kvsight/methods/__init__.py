"""Published methods, one per file. A file in this package that defines ``METHOD`` is a method.

A file may also define ``FAMILY``: methods whose names spell their settings, of which some are listed.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType

from kvsight.errors import KVSightError
from kvsight.methods.base import Method


def available() -> dict[str, Method]:
    """Every method by name, in alphabetical order."""
    found = _modules()
    methods = [module.METHOD for module in found if hasattr(module, "METHOD")]
    methods += [method for module in found if hasattr(module, "FAMILY") for method in module.FAMILY.usual]
    return {method.name: method for method in sorted(methods, key=lambda m: m.name)}


def _modules() -> list[ModuleType]:
    return [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]


def names() -> tuple[str, ...]:
    """The names of all methods; each works in ``fit(..., method=name)``."""
    return tuple(available())


def get(name: str) -> Method:
    """The method of that name; an unknown one raises with the nearest and the list."""
    methods = available()
    if name in methods:
        return methods[name]
    for module in _modules():
        made: Method | None = module.FAMILY.named(name) if hasattr(module, "FAMILY") else None
        if made is not None:
            return made
    near = difflib.get_close_matches(name, methods, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise KVSightError(f"unknown method {name!r}.{hint} Available: {', '.join(methods)}.")
