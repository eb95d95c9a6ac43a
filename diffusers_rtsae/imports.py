"""Lazy imports: names of a package that are imported when they are first used, and functions that are called when a
module of another package is imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_demand(package: str, modules: Sequence[str], names: Collection[str]) -> Callable[[str], object]:
    """A `__getattr__` for a package that imports `names` on first use, from the first of these modules that has it."""

    def __getattr__(name: str) -> object:
        for module in modules if name in names else ():
            imported = importlib.import_module(f".{module}", package)
            if hasattr(imported, name):
                return getattr(imported, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with the module of this name: at once if it is imported already, else when it is imported."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, then))


class _Waiting(MetaPathFinder):
    """Finds one module with the other finders, and makes its loader call `then` after executing it."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self.name, self.then = name, then

    def find_spec(self, name: str, path, target=None) -> ModuleSpec | None:
        if name != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module
        return spec
