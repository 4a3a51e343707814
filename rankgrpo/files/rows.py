"""Rows of JSONL and CSV files, each with its line number, or with what is wrong with it."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankgrpo.errors import DataError


@dataclass(frozen=True, slots=True)
class Problem:
    """What looks wrong in a file and does not stop its reading. Example: Problem("unknown fields", "a.csv:1", "...")"""

    kind: str
    """What all problems of its sort have in common, as a plural."""
    where: str
    """`file:line`."""
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line number, object) for every non-blank line, or (line number, what is wrong with it).

    Lines end at `\\n` only: what people write may hold U+2028, at which str.splitlines would split.
    """
    with path.open("rb") as file:
        yield from parse_jsonl(file)


def read_log(path: Path) -> tuple[list[tuple[int, dict[str, Any] | str]], str | None]:
    """What `read_jsonl` yields of a file that a run appends to, without a broken last line, and what was wrong with it.

    A kill while writing cuts the last line short. None when it is whole.
    """
    rows = list(read_jsonl(path))
    if not rows or not isinstance(rows[-1][1], str):
        return rows, None
    line, problem = rows.pop()
    return rows, f"{path.parent.name}/{path.name}:{line} was skipped: {problem}, as after a kill while writing."


def parse_jsonl(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """What `read_jsonl` yields, of lines from anywhere."""
    for line, raw in enumerate(lines, start=1):
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            if not text:
                continue
            row = json.loads(text)
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeDecodeError as error:
            yield line, f"not UTF-8 (byte {error.start} of the line)"
        except UnicodeEncodeError:
            yield line, "holds half a surrogate pair (\\ud800..\\udfff), which is no text"
        except json.JSONDecodeError as error:
            yield line, f"broken JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
            yield line, f"unreadable JSON: {error}"
        else:
            yield line, row if isinstance(row, dict) else f"expected a JSON object, got {type_name(row)}"


def read_json(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (place from 1, object) of a .json file: an array of objects, or lines of them; or what is wrong."""
    with path.open("rb") as file:
        start = file.read(64).decode("utf-8-sig", "replace").lstrip()
    if not start.startswith("["):
        yield from read_jsonl(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        yield 1, f"broken JSON: {error}"
        return
    for place, row in enumerate(rows, start=1):
        yield place, row if isinstance(row, dict) else f"expected a JSON object, got {type_name(row)}"


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (row from 1, values by column, without those that are null) of a parquet file."""
    place = 0
    for batch in open_parquet(path).iter_batches():
        for row in batch.to_pylist():
            place += 1
            yield place, {name: value for name, value in row.items() if value is not None}


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile. Raises DataError without pyarrow, and for a file that is none."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'rankgrpo[import]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole parquet file ({error}); copy it again") from None


def parse_list_text(text: str) -> list[Any] | None:
    """The list that a text is, in JSON or as Python writes it; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, list) else None
    return None


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def type_name(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    names = {bool: "true/false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def read_csv(path: Path, *, columns: Sequence[str] = ("title", "year")) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line where the record starts, non-empty cells by lower-case column name), or (line, what is wrong).

    `columns` are those that the first line must name.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from parse_csv(file, columns=columns)


def parse_csv(
    file: Iterable[str], *, columns: Sequence[str] = ("title", "year")
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """What `read_csv` yields, of text from anywhere."""
    reader = csv.reader(file, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except (csv.Error, UnicodeDecodeError) as error:
            # Past this point quotes and bytes have lost their place, so further rows would be noise.
            yield line, f"unreadable CSV from here on: {error}"
            return
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip().lower() for cell in cells]
            if problem := _header_problem(header, columns):
                yield line, problem
                return
        elif len(cells) > len(header):
            yield line, f"{len(cells)} cells for {len(header)} columns; quote cells that hold a comma"
        else:
            yield line, {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}


def _header_problem(columns: list[str], needed: Sequence[str]) -> str | None:
    if missing := [name for name in needed if name not in columns]:
        needed_names, names = " and ".join(needed), " and ".join(missing)
        return f"the first line must name comma-separated columns {needed_names}; {names} missing in {columns}"
    if len(set(columns)) < len(columns):
        return f"the first line names a column twice: {columns}"
    return None
