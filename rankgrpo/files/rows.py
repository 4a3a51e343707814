"""Rows of JSONL and CSV files, each with its line number, or with what is wrong with it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
