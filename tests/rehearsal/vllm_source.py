"""The CUDA build of the pinned vLLM, as far as its source tells: its classes and functions with their real signatures.

The wheel is downloaded and its Python files are unpacked, not installed. `package(answers)` makes `import vllm` find
modules that are read from them and never run: every class has the bases, fields, properties and methods of the source,
and a call is bound to the source's arguments before `answers` decides what it returns, by name, as in
{"LLM.sleep": lambda self, level, mode: None}. Names that the source does not have are missing here, too.
"""

from __future__ import annotations

import abc
import ast
import contextlib
import dataclasses
import enum
import importlib
import importlib.abc
import importlib.machinery
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import fake_gpu

from rankgrpo.sampler.vllm import PINNED

WHEEL_SECONDS = 600


class Unavailable(Exception):
    """There is no wheel to read."""


@cache
def folder() -> Path:
    """The unpacked files; downloaded once. Raises Unavailable saying why they cannot be had."""
    target = fake_gpu.BUILD / f"vllm-{PINNED}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        command += ["--only-binary=:all:", "--dest", str(part), f"vllm=={PINNED}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WHEEL_SECONDS, check=False)
        wheels = list(part.glob("*.whl"))
        if not wheels:
            raise Unavailable(f"the wheel of vllm {PINNED} cannot be had: {done.stderr.strip()[-200:] or 'no wheel'}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(part / "py", [name for name in wheel.namelist() if name.endswith(".py")])
        (part / "py").replace(target)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"the wheel of vllm {PINNED} did not arrive within {WHEEL_SECONDS} s") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def text_of(module: str) -> str:
    path = folder().joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def allowed_values(module: str, name: str) -> tuple:
    """The values of `name = Literal[...]` in a module of vLLM."""
    for node in ast.walk(ast.parse(text_of(module))):
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id == name and isinstance(node.value, ast.Subscript):
            return tuple(value.value for value in ast.walk(node.value.slice) if isinstance(value, ast.Constant))
    raise AssertionError(f"{module} has no {name}")


class _Module(ModuleType):
    """A module of the source, whose names are made when they are asked for."""

    def __init__(self, name: str, answers: dict[str, Callable]):
        super().__init__(name)
        tree = ast.parse(text_of(name))
        path = folder().joinpath(*name.split("."))
        self.__path__ = [str(path)] if path.is_dir() else []
        self._answers, self._made = answers, {}
        self._defined = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        self._imported = {
            alias.asname or alias.name: (self._absolute(node), alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        self._stars = [self._absolute(n) for n in tree.body if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
        if name == "vllm":  # its lazy table: {"LLM": ".entrypoints.llm:LLM", ...}
            self.__version__ = PINNED
            table = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "MODULE_ATTRS")
            for key, place in ast.literal_eval(table).items():
                module, _, attribute = place.partition(":")
                self._imported[key] = (f"vllm{module}", attribute)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.__name__.split(".") if self.__path__ else self.__name__.split(".")[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])

    def __getattr__(self, name: str) -> Any:
        made = self.__dict__["_made"] if "_made" in self.__dict__ else {}
        if name in made:
            return made[name]
        if name in self.__dict__.get("_defined", ()):
            node = self._defined[name]
            value = self._class(node) if isinstance(node, ast.ClassDef) else self._function(node, node.name)
        elif name in self.__dict__.get("_imported", ()) and self._imported[name][0].split(".")[0] == "vllm":
            module, attribute = self._imported[name]
            value = getattr(importlib.import_module(module), attribute)
        else:
            value = self._from_star(name)
        made[name] = value
        return value

    def _from_star(self, name: str) -> Any:
        for module in self.__dict__.get("_stars", ()):
            with contextlib.suppress(AttributeError):
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"vLLM {PINNED}: {self.__name__} has no {name}")

    def _class(self, node: ast.ClassDef) -> type:
        bases, known = [], {"ABC": abc.ABC, "Enum": enum.Enum}
        for base in node.bases:
            name = ast.unparse(base)
            if name in known:
                bases.append(known[name])
            elif name in self._defined or self._imported.get(name, ("",))[0].startswith("vllm."):
                bases.append(getattr(self, name))
        decorators = {ast.unparse(d).partition("(")[0].split(".")[-1] for d in node.decorator_list}
        record = bool(decorators & {"dataclass", "config"}) or any("Struct" in ast.unparse(b) for b in node.bases)
        if enum.Enum in bases:
            members = [n.targets[0].id for n in node.body if isinstance(n, ast.Assign)]
            return enum.Enum(node.name, members)
        space: dict[str, Any] = {"__module__": self.__name__, "__annotations__": {}}
        for item in node.body:
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not (record and item.name == "__init__"):
                space[item.name] = self._function(item, f"{node.name}.{item.name}")
            elif isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
                space["__annotations__"][item.target.id] = Any
                if item.value is not None and record:
                    space[item.target.id] = None
        space.pop("__post_init__", None)
        made = type(node.name, tuple(dict.fromkeys(bases)) or (object,), space)
        return dataclasses.dataclass(made) if record else made

    def _function(self, node: ast.FunctionDef, qualified: str) -> Any:
        """A function of the same arguments; `answers` says what it returns."""
        arguments = ast.parse(f"def f({ast.unparse(node.args)}): pass").body[0].args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            argument.annotation = None
        for variadic in (arguments.vararg, arguments.kwarg):
            if variadic is not None:
                variadic.annotation = None
        arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
        arguments.kw_defaults = [None if value is None else ast.Constant(None) for value in arguments.kw_defaults]
        body = ast.parse("return __answer__(locals())").body
        function = ast.FunctionDef(name=node.name, args=arguments, body=body, decorator_list=[])
        module = ast.fix_missing_locations(ast.Module([function], []))
        space: dict[str, Any] = {"__answer__": lambda given: self._answer(qualified, given)}
        exec(compile(module, f"<{self.__name__}>", "exec"), space)
        made = space[node.name]
        for decorator in map(ast.unparse, node.decorator_list):
            wrap = {"abstractmethod": abc.abstractmethod, "classmethod": classmethod, "staticmethod": staticmethod}
            made = property(made) if decorator in ("property", "cached_property") else wrap.get(decorator, _same)(made)
        return made

    def _answer(self, qualified: str, given: dict[str, Any]) -> Any:
        if qualified in self._answers:
            return self._answers[qualified](**given)
        if qualified.endswith("__init__"):
            return None
        raise NotImplementedError(f"vLLM's {qualified} was called, and nothing says what it returns")


def _same(function: Callable) -> Callable:
    return function


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, answers: dict[str, Callable]):
        self.answers = answers

    def find_spec(self, name, path=None, target=None):
        place = folder().joinpath(*name.split("."))
        if name.split(".")[0] != "vllm" or not (place.is_dir() or place.with_suffix(".py").is_file()):
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=str(place), is_package=place.is_dir())

    def create_module(self, spec):
        return _Module(spec.name, self.answers)

    def exec_module(self, module) -> None:
        """Nothing of vLLM is run."""


@contextlib.contextmanager
def package(answers: dict[str, Callable]) -> Iterator[ModuleType]:
    """`import vllm` finds the source inside the block."""
    finder = _Finder(answers)
    with mock.patch.object(sys, "meta_path", [finder, *sys.meta_path]):
        try:
            yield importlib.import_module("vllm")
        finally:
            for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
                del sys.modules[name]
