"""Tables of what users chose: columns of CSV, JSONL and parquet files, row by row, under names of one's own."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from rankgrpo.errors import DataError
from rankgrpo.files.rows import (
    is_missing,
    open_parquet,
    parse_list_text,
    plain_text,
    read_csv,
    read_jsonl,
    read_parquet,
)

# Shape letters: R rows of a log.

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
MAX_ERRORS = 1000
"""Unusable rows after which reading stops: the column, and not the row, is wrong then."""


@dataclass
class Log:
    """Who chose what and when, coded: row r is `users[user_R[r]]` and `items[item_R[r]]`, in line `line_R[r]`."""

    path: Path
    user_R: np.ndarray
    item_R: np.ndarray
    line_R: np.ndarray
    users: list[str]
    items: list[str]
    time_R: np.ndarray | None
    """Numbers, or seconds since 1970 of dates; None without such a column: the order of the file is the order."""
    rating_R: np.ndarray | None


def rows_of(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(line, or row of a parquet file; the values of the columns named) of every row; an optional column may be None.

    A CSV's names are compared in lower case. Raises DataError naming the file for columns that it lacks and for rows
    that cannot be read.
    """
    there = column_names(path)
    lower = {name.lower(): name for name in there}
    names = [lower.get(name.lower()) for name in (*needed, *optional)]
    if missing := [name for name, found in zip(needed, names, strict=False) if found is None]:
        raise DataError(
            f"{path}: no column {' and no column '.join(missing)}; there is {', '.join(there)}; say which column is "
            f"which by --columns, for example {missing[0]}=NAME"
        )
    readers = {".csv": _csv_values, ".tsv": _csv_values, ".jsonl": _jsonl_values, ".parquet": _parquet_values}
    yield from readers[path.suffix.lower()](path, names)


def column_names(path: Path) -> list[str]:
    """The columns of a table: of the header, or of the first object of a JSONL file."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: a table is a {', '.join(SUFFIXES)} file, got {suffix or 'no suffix'!r}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if suffix == ".parquet":
        return list(open_parquet(path).schema_arrow.names)
    if suffix == ".jsonl":
        row = next((row for _, row in read_jsonl(path)), {})
        if isinstance(row, str):
            raise DataError(f"{path}:1: {row}")
        return list(row)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            return [cell.strip() for cell in next(csv.reader(file, delimiter=_delimiter(path)), [])]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:1: unreadable CSV: {error}; save it as UTF-8 text") from None


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, row or what is wrong with it) of a table; a CSV's names in lower case, its empty cells left out."""
    suffix = path.suffix.lower()
    column_names(path)
    if suffix == ".parquet":
        yield from read_parquet(path)
    elif suffix == ".jsonl":
        yield from read_jsonl(path)
    elif suffix == ".tsv":
        names = [name.lower() for name in column_names(path)]
        for line, cells in _csv_cells(path):
            yield line, {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}
    else:
        yield from read_csv(path, columns=())


def read_log(path: Path, user: str, item: str, time: str | None, rating: str | None) -> Log:
    """A log of interactions. Raises DataError naming file and line of every row without a user or an item, and of times
    and ratings that are no such thing."""
    users, items = _Codes(), _Codes()
    line_R, time_R, rating_R = array("q"), _Times(), array("d")
    errors: list[str] = []
    needed = [user, item, *(name for name in (time, rating) if name is not None)]
    for line, (who, what, *rest) in rows_of(path, needed):
        try:
            user_code, item_code = users.code(who, user), items.code(what, item)
            if time is not None:
                time_R.append(rest[0], time)
            if rating is not None:
                rating_R.append(_number(rest[-1], rating))
        except DataError as error:
            errors.append(f"{path}:{line}: {error}")
            if len(errors) == MAX_ERRORS:
                break
            continue
        users.codes.append(user_code)
        items.codes.append(item_code)
        line_R.append(line)
    if errors:
        raise DataError(f"{path}: {len(errors)} unusable row(s):", errors)
    if not line_R:
        raise DataError(f"{path}: no interaction in this log; it needs a row for each, with {user} and {item}")
    return Log(
        path,
        np.array(users.codes, dtype=np.int64),
        np.array(items.codes, dtype=np.int64),
        np.array(line_R),
        users.values,
        items.values,
        time_R.numbers(path) if time is not None else None,
        np.array(rating_R) if rating is not None else None,
    )


def key_of(value: object) -> str:
    """An id as text: 7, 7.0 and "7" are one id, whichever file writes which."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def filled(value: object, name: str) -> str:
    """The id that a cell holds. Raises DataError for an empty one."""
    key = "" if is_missing(value) else key_of(value)
    if not key:
        raise DataError(f"{name} is empty")
    return key


_NO_ITEM = (list, dict, bytes)


def a_list(value: object, name: str) -> list[Any]:
    """The entries of a list, or of a text that is one: JSON, a Python literal, or entries separated by `|`."""
    if isinstance(value, str):
        listed = parse_list_text(value, name, of_names=True)
        value = listed if listed is not None else [part for part in map(str.strip, value.split("|")) if part]
    if isinstance(value, tuple | np.ndarray):
        value = list(value)
    if not isinstance(value, list) or any(isinstance(entry, _NO_ITEM) or is_missing(entry) for entry in value):
        raise DataError(f'{name} must be a list of items, ["a", "b"] or a|b, got {str(value)!r:.80}')
    return value


@dataclass
class _Codes:
    """Values numbered in order of first appearance."""

    values: list[str] = field(default_factory=list)
    codes: array = field(default_factory=lambda: array("l"))
    _code_of: dict[object, int] = field(default_factory=dict)

    def code(self, value: object, name: str) -> int:
        code = self._code_of.get(value)
        if code is None:
            key = filled(value, name)
            code = self._code_of.get(key, len(self.values))
            if code == len(self.values):
                self.values.append(key)
            self._code_of[key] = self._code_of[value] = code
        return code


@dataclass
class _Times:
    """Times of a log, all numbers or all dates."""

    seconds: array = field(default_factory=lambda: array("d"))
    kinds: dict[str, object] = field(default_factory=dict)
    """Kind and the first value of it."""

    def append(self, value: object, name: str) -> None:
        number: float | None = None
        kind = "numbers"
        if isinstance(value, datetime):
            number, kind = _seconds(value), "dates"
        else:
            try:
                number = float(value)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                try:
                    number, kind = _seconds(datetime.fromisoformat(str(value).strip())), "dates"
                except ValueError:
                    pass
        if number is None or not math.isfinite(number):
            raise DataError(
                f"{name} {value!r} is neither a number nor a date such as 2024-05-31 or 2024-05-31T18:30:00; convert "
                "the column, or import without it (--columns time=none) and the order of the file counts"
            )
        self.kinds.setdefault(kind, value)
        self.seconds.append(number)

    def numbers(self, path: Path) -> np.ndarray:
        if len(self.kinds) > 1:
            values = " and ".join(repr(value) for value in self.kinds.values())
            raise DataError(f"{path}: times are numbers in some rows and dates in others ({values}); write all alike")
        return np.array(self.seconds)


def _seconds(date: datetime) -> float:
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _number(value: object, name: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{name} must be a number, got {value!r}")
    return number


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True, delimiter=_delimiter(path))
        try:
            width = len(next(reader))
            line = reader.line_num + 1
            for cells in reader:
                if len(cells) > width:
                    raise DataError(f"{path}:{line}: {len(cells)} cells for {width} columns; quote what holds a comma")
                if any(cells):
                    yield line, cells
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            way_out = "; save it as UTF-8 text" if isinstance(error, UnicodeDecodeError) else ""
            raise DataError(f"{path}:{reader.line_num + 1}: unreadable CSV from here on: {error}{way_out}") from None


def _csv_values(path: Path, names: Sequence[str | None]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    there = column_names(path)
    places = [there.index(name) if name is not None else None for name in names]
    for line, cells in _csv_cells(path):
        num_cells = len(cells)
        yield line, tuple(cells[p] if p is not None and p < num_cells and cells[p] != "" else None for p in places)


def _jsonl_values(path: Path, names: Sequence[str | None]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    for line, row in read_jsonl(path):
        if isinstance(row, str):
            raise DataError(f"{path}:{line}: {row}")
        yield line, tuple(row.get(name) for name in names)


def _parquet_values(path: Path, names: Sequence[str | None]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    wanted = list(dict.fromkeys(name for name in names if name is not None))
    start = 1
    for batch in open_parquet(path).iter_batches(columns=wanted):
        columns: Mapping[str, list[Any]] = {
            name: plain_text(batch.column(name), f"{path}: column {name}, from row {start} on") for name in wanted
        }
        nothing = [None] * batch.num_rows
        values = zip(*(columns[name] if name is not None else nothing for name in names), strict=True)
        yield from enumerate(values, start=start)
        start += batch.num_rows
