"""How a section of the configuration is checked, and what is said of a value that cannot be.

`section` makes the frozen dataclasses of `config`; pydantic checks them, and what it finds is told in this project's
words: key, what may stand there, what did. `config_file` adds the file or the override it came from.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from rankgrpo.errors import ConfigError


class Fault(NamedTuple):
    """One thing that is wrong with a section."""

    keys: tuple[str, ...]
    """The key it is about, then the keys it depends on, as `section.key`."""
    text: str
    is_rule: bool = False
    """Whether a value of the right type broke a rule (the text then begins with the key); else its type is wrong."""

    def told(self, sources: Mapping[str, str]) -> str:
        """The fault with the file or the override that set the key, from `sources`."""
        source = next((sources[key] for key in self.keys if sources.get(key)), "")
        if not source:
            return self.text
        return f"{self.text} ({source})" if self.is_rule else f"{source}: {self.text}"


class SectionError(ConfigError):
    """All that is wrong with one section, not yet traced to the file or the override that set it."""

    def __init__(self, faults: list[Fault]):
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(fault.text for fault in self.faults)


class BrokenRule(ValueError):
    """Settings that do not go together. `keys`, of one section: the one to change, then those it depends on."""

    def __init__(self, message: str, *keys: str):
        super().__init__(message)
        self.keys = keys


_Section = TypeVar("_Section")
_TYPES = {
    "int_type": "int",
    "float_type": "float",
    "bool_type": "bool",
    "string_type": "str",
    "two_numbers": "a list of 2 numbers",
}
_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}
_SHORT = {"above 0": "be positive", "at least 0": "not be negative"}


@dataclass_transform(frozen_default=True)
def section(cls: type[_Section]) -> type[_Section]:
    """A frozen dataclass of strict types whose values are checked when it is made. `RlConfig` is the section `rl`."""
    cls = pydantic_dataclass(
        frozen=True, config=ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)
    )(cls)
    check = cls.__init__

    @functools.wraps(check)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            check(self, *args, **kwargs)
        except ValidationError as error:
            raise SectionError(_faults(error, cls)) from None

    cls.__init__ = __init__
    return cls


def unknown_key(key: str, known: Iterable[str]) -> Fault:
    return Fault((key,), f"unknown key {key!r}; known keys are {', '.join(known)}")


def _faults(error: ValidationError, cls: type) -> list[Fault]:
    prefix = cls.__name__.removesuffix("Config").lower()

    def dotted(name: Any) -> str:
        return f"{prefix}.{name}" if prefix else str(name)

    faults, known = [], [f.name for f in dataclasses.fields(cls)]
    for details in error.errors(include_url=False):
        name, kind = next(iter(details["loc"]), ""), details["type"]
        if isinstance(name, int):  # a positional argument
            name = known[name] if name < len(known) else f"argument {name + 1}"
        if kind == "value_error":
            broken = details["ctx"]["error"]
            keys = tuple(dotted(key) for key in getattr(broken, "keys", (name,)))
            faults.append(Fault(keys, f"{keys[0]}: {broken}", is_rule=True))
        elif kind == "unexpected_keyword_argument":
            faults.append(unknown_key(dotted(name), map(dotted, known)))
        elif kind in _BOUNDS:
            bound = f"{_BOUNDS[kind]} {next(iter(details['ctx'].values())):g}"
            text = f"{dotted(name)}: must {_SHORT.get(bound, f'be {bound}')}, got {details['input']!r}"
            faults.append(Fault((dotted(name),), text, is_rule=True))
        else:
            hint = typing.get_type_hints(cls).get(name)
            faults.append(Fault((dotted(name),), _wrong_type(dotted(name), hint, details)))
    return faults


def _wrong_type(key: str, hint: Any, details: Mapping[str, Any]) -> str:
    kind = details["type"]
    if kind == "literal_error":
        expected = f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    elif kind == "dataclass_exact_type":
        expected = details["ctx"]["class_name"]
    elif kind in _TYPES:
        expected = _TYPES[kind]
    else:
        return f"{key}: {details['msg']}, got {details['input']!r}"
    return f"{key} must be {expected}, got {details['input']!r}"
