"""Types of settings, and what their values may be."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from rankgrpo.files.template import item_problem


def _number_as_text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value


def _two_numbers(value: Any, check: ValidatorFunctionWrapHandler) -> tuple[float, float]:
    try:
        return check(tuple(value) if isinstance(value, list) else value)
    except ValidationError:
        raise PydanticCustomError("two_numbers", "not two numbers") from None


def check_names(value: str) -> str:
    """A word, or names with commas between."""
    if not all(name.strip() for name in value.split(",")):
        raise ValueError("must be linear, or names with commas between")
    return value


def check_json_object(value: str) -> str:
    """JSON of an object, as text."""
    try:
        is_object = isinstance(json.loads(value), dict)
    except json.JSONDecodeError:
        is_object = False
    if not is_object:
        raise ValueError('must be a JSON object such as {"enable_thinking": false}')
    return value


def check_cutoffs(value: str) -> str:
    """Ranks with commas between."""
    found = [name.strip() for name in value.split(",")]
    if not all(name.isdecimal() and int(name) > 0 for name in found) or len(set(map(int, found))) < len(found):
        raise ValueError("must be different whole numbers above 0, with commas between")
    return value


def check_item(value: str) -> str:
    """A template that `rankgrpo.items.format` can write items by."""
    if problem := item_problem(value):
        raise ValueError(problem)
    return value


def check_folds(value: int) -> int:
    """0, or 2 and more."""
    if value == 1:
        raise ValueError("must be 0, or 2 and more")
    return value


Text = Annotated[str, BeforeValidator(_number_as_text)]
Betas = Annotated[tuple[float, float], WrapValidator(_two_numbers)]
Share = Annotated[float, Field(gt=0, le=1)]
"""In (0, 1]."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
"""In [0, 1)."""
