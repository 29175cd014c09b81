"""Names of a package that are read from its modules at first use.

A scorer's worker process imports a module deep in the package, and needs none of torch, Lightning
and transformers, which its packages' other names do.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562).

    Args:
        modules: the full name of the module of each public name.
    """

    def read(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"no such name: {name}")
        return getattr(import_module(modules[name]), name)

    return read
