"""Rows of JSONL and CSV files, each with its line number, or with what is wrong with it."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import tokenize
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
        names = batch.schema.names
        where = f"{path}: from row {place + 1} on, column"
        columns = [plain_text(column, f"{where} {name}") for name, column in zip(names, batch.columns, strict=True)]
        for row in zip(*columns, strict=True):
            place += 1
            yield place, {name: value for name, value in zip(names, row, strict=True) if not is_missing(value)}


def plain_text(column: Any, where: str) -> list[Any]:
    """The values of an Arrow column; bytes, which is how some programs store text, as text.

    Raises DataError, with the place, for bytes that are no UTF-8.
    """
    values = column.to_pylist()
    if "binary" not in str(column.type):
        return values
    try:
        return [_decoded(value) for value in values]
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: bytes that are no UTF-8 text ({error}); convert the column to text") from None


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    return {name: _decoded(entry) for name, entry in value.items()} if isinstance(value, dict) else value


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


def parse_list_text(text: str, name: str, *, of_names: bool = False) -> list[Any] | None:
    """The list that a text is, in JSON, as Python writes it, or as numpy prints it (`['a' 'b']`); None for other text.

    Raises DataError, with the field's name, for a text that is meant as a list and cannot be read as one: one item that
    is many glued together would never be found. Where `of_names` says that it is no talk, so are words in brackets with
    commas between, and a list that is cut off.
    """
    text = text.strip()
    if not text.startswith("["):
        return None
    # Python takes two texts side by side for one, and numpy prints two entries so.
    plain = () if _SIDE_BY_SIDE.search(text) else (ast.literal_eval,)
    for read in (json.loads, *plain, _spaced_literal):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if isinstance(value, list):
            return [list(entry) if isinstance(entry, tuple) else entry for entry in value]
    closes = _LIST_CLOSING.search(text) or (of_names and (text.endswith("]") or "]" not in text))
    if (_LIST_OPENING.match(text) and closes) or (of_names and _WORDS_IN_BRACKETS.fullmatch(text)):
        raise DataError(
            f'{name} {text!r:.80} looks like a list and cannot be read as one; write it as JSON: ["a", "b"], or '
            '["[a, b]"] where brackets and commas belong to a single entry'
        )
    return None


_SIDE_BY_SIDE = re.compile(r"""['"]\s*[bBrRuU]{0,2}['"]""")
_NUMBER = r"(?:[-+.]?\d[\d.e+-]*|nan|None)"
_LIST_OPENING = re.compile(
    rf"""\[\s*(?:['"{{\[(]|[bru]['"]|{_NUMBER}\s+(?:{_NUMBER}|\.\.\.)|(?:np\.\w+|array|list|tuple)\()"""
)
_LIST_CLOSING = re.compile(rf"""(?:['"}}\])]|\s{_NUMBER})\s*\]\Z""")
_WORDS_IN_BRACKETS = re.compile(r"\[[^\[\]]*,[^\[\]]*\]")


def _spaced_literal(text: str) -> Any:
    """The value of a Python literal, in the lists of which spaces alone may stand between entries.

    ValueError where spaces and commas separate entries of one list: Python would take two of its texts for one.
    """
    pieces: list[str] = []
    separators: list[set[str]] = [set()]  # of every bracket that is open
    before: tokenize.TokenInfo | None = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER):
            continue
        if before is not None and _ends_value(before) and _begins_value(token):
            if before.end == token.start or (token.string == "(" and before.string != ")"):
                raise ValueError(f"{before.string}{token.string} is no entry")
            pieces.append(",")
            separators[-1].add(" ")
        if token.string in ("[", "{", "("):
            separators.append({token.string})
        elif token.string in (",", ":"):
            separators[-1].add(token.string)
        if " " in separators[-1] and separators[-1] != {"[", " "}:
            raise ValueError("spaces separate entries, and so does something else")
        if token.string in ("]", "}", ")") and len(separators) > 1:
            separators.pop()
        pieces.append(token.string)
        before = token
    return ast.literal_eval(" ".join(pieces))


def _ends_value(token: tokenize.TokenInfo) -> bool:
    return token.type in (tokenize.STRING, tokenize.NUMBER, tokenize.NAME) or token.string in ("]", "}", ")")


def _begins_value(token: tokenize.TokenInfo) -> bool:
    # A sign begins a number: in a list of literals nothing is added up.
    return token.type in (tokenize.STRING, tokenize.NUMBER, tokenize.NAME) or token.string in ("[", "{", "(", "-", "+")


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
            way_out = "; save it as UTF-8 text" if isinstance(error, UnicodeDecodeError) else ""
            yield line, f"unreadable CSV from here on: {error}{way_out}"
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
