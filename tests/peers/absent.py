"""Real modules of a trainer without the packages that they import and do not use in what is tested."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


class _Names(type):
    """Any attribute is another such class."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _anything(name)


def _anything(name: str) -> type:
    """A class that can be subclassed, subscripted, called, and put before a function as a decorator."""
    return _Names(
        name,
        (),
        {
            "__init__": lambda self, *args, **options: None,
            "__call__": lambda self, function=None, *args, **options: function,
            "__class_getitem__": classmethod(lambda cls, item: cls),
            "__getattr__": lambda self, name: getattr(type(self), name),
        },
    )


class _Absent(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _anything(name)


class _Finder:
    def __init__(self, roots: set[str]) -> None:
        self.roots = roots

    def find_spec(self, name: str, path=None, target=None):
        if any(name == root or name.startswith(root + ".") for root in self.roots):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module) -> None:
        module.__path__ = []


def absent(*names: str, **attributes: dict) -> None:
    """Replace modules by empty ones of which any name can be imported; `ray={"is_initialized": f}` gives a real one.

    A name that is installed is left alone, unless it has a dot: a part of the trainer itself that is not needed.
    """
    roots = {name for name in (*names, *attributes) if "." in name or importlib.util.find_spec(name) is None}
    sys.meta_path.insert(0, _Finder(roots))
    for name, values in attributes.items():
        vars(importlib.import_module(name)).update(values)


def bare_package(name: str) -> None:
    """A package whose own __init__ is not run: only its modules can be imported."""
    folder, _, last = name.rpartition(".")
    if folder:
        places = importlib.import_module(folder).__path__
    else:
        places = [str(Path(place).parent) for place in importlib.util.find_spec(name).submodule_search_locations]
    module = ModuleType(name)
    module.__path__ = [str(Path(place) / last) for place in places]
    sys.modules[name] = module
