"""Runs the tests of this folder where pytest is not installed: `python tests/gpu/plain_runner.py [FOLDER]`.

It knows what they use of pytest: marks `parametrize` and `skipif`, fixtures of a module (also as generators, also
autouse) and `raises`. Prints a line a test that fails; the exit status is 1 when one did.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path


class Mark:
    """`pytest.mark`: parametrize and skipif are kept with the function or the module, others mean nothing here."""

    def __getattr__(self, name: str):
        def mark(*args, **kwargs):
            if name == "skipif":
                return kwargs["reason"] if args[0] else None

            def keep(function: Callable) -> Callable:
                if name == "parametrize":
                    function.cases = [*getattr(function, "cases", []), args]
                return function

            return keep

        return mark


def fixture(function: Callable | None = None, *, autouse: bool = False):
    def keep(function: Callable) -> Callable:
        function.is_fixture, function.autouse = True, autouse
        return function

    return keep if function is None else keep(function)


@contextlib.contextmanager
def raises(kind: type[Exception], match: str = "") -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert re.search(match, str(error)), f"{error!s} does not match {match!r}"
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


def cases_of(function: Callable) -> Iterator[dict]:
    """The arguments of every case of a test."""
    axes = [[{name: value} for value in values] for name, values in getattr(function, "cases", [])]
    for chosen in itertools.product(*axes):
        yield {key: value for one in chosen for key, value in one.items()}


def run_test(module: types.ModuleType, function: Callable, arguments: dict) -> None:
    wanted = inspect.signature(function).parameters
    with contextlib.ExitStack() as stack:
        for name, made in vars(module).items():
            if getattr(made, "is_fixture", False) and (made.autouse or name in wanted):
                is_generator = inspect.isgeneratorfunction(made)
                value = stack.enter_context(contextlib.contextmanager(made)()) if is_generator else made()
                arguments = arguments | ({name: value} if name in wanted else {})
        function(**arguments)


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    sys.modules["pytest"] = types.ModuleType("pytest")
    vars(sys.modules["pytest"]).update(mark=Mark(), fixture=fixture, raises=raises)
    passed = failed = skipped = 0
    for path in sorted(folder.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        why = [mark for mark in getattr(module, "pytestmark", []) if isinstance(mark, str)]
        tests = [f for name, f in vars(module).items() if name.startswith("test_") and callable(f)]
        for function, arguments in ((f, case) for f in tests for case in cases_of(f)):
            if why:
                skipped += 1
                continue
            try:
                run_test(module, function, arguments)
                passed += 1
            except Exception:  # every kind of failure is one of the test, and told
                failed += 1
                print(f"FAILED {path.name}::{function.__name__} {arguments}\n{traceback.format_exc()}", flush=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
