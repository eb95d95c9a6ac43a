"""Imports that wait: names of a package that are imported when they are asked for, and what is done once another
package's module is there."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_demand(package: str, modules: Sequence[str], names: Collection[str]) -> Callable[[str], object]:
    """A package's `__getattr__`, which finds its `names` in these of its modules, and imports each only then."""

    def __getattr__(name: str) -> object:
        for module in modules if name in names else ():
            imported = importlib.import_module(f".{module}", package)
            if hasattr(imported, name):
                return getattr(imported, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with the module of this name: now if it is imported, else when it is, before anybody has it."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, then))


class _Waiting(MetaPathFinder):
    """Finds one module as the other finders do, and has its loader go on with `then`."""

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
