"""Doing something whenever another module gets imported, without importing it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType


def after_import(name: str, function: Callable[[ModuleType], object]) -> None:
    """Call a function with a module: now if that is imported, and whenever it is (again, or reloaded).

    Args:
        name: of the module.
        function: must import nothing: it is called while the module's import lock is held. What it raises, the import
            raises. A second function for the same name takes the first one's place.
    """
    _FINDER.functions[name] = function
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    # Afterwards, so that no import of another thread falls between; and import_module waits for one that has begun.
    if sys.modules.get(name) is not None:
        function(importlib.import_module(name))


class _Finder:
    """Finds the modules that a function waits for with the finders behind it."""

    def __init__(self):
        self.functions: dict[str, Callable[[ModuleType], object]] = {}

    def find_spec(self, name, path=None, target=None):
        if name not in self.functions:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.functions[name])  # type: ignore[assignment]  # acts as one
                return spec
        return None


class _Loader:
    """Another loader, and what comes after it."""

    def __init__(self, loader, function):
        self._loader, self._function = loader, function

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def exec_module(self, module):
        # The module looks as if nobody had waited for it.
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._function(module)


_FINDER = _Finder()
