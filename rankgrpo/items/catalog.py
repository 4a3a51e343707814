"""The catalog: the items a list may name, and the one way to look a title up.

Reads JSONL and CSV, reports every bad row at once with file and line, and answers `(title, year) -> index` by
normalised title, exact year first. It does not guess: no fuzzy titles, no spelling correction. An item also goes by its
other titles, and where the catalog writes "Matrix, The", by "The Matrix".
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from rankgrpo.errors import DataError
from rankgrpo.files.atomic import write_lines
from rankgrpo.files.rows import Problem, is_missing, parse_list_text, read_csv, read_jsonl, type_name
from rankgrpo.items.format import FILM, ItemFormat, title_line
from rankgrpo.items.titles import natural_order
from rankgrpo.parse import ListedItem, parse_list
from rankgrpo.thoughts import find_mark

MIN_YEAR, MAX_YEAR = 1870, 2100  # first moving pictures; anything later is a typing error

_MAX_TITLE_CHARS = 300
_TITLE_YEAR = re.compile(r"(?P<title>.*\S)\s*\((?P<year>\d{4})\)", re.ASCII)
# "2008-2013", "2008-", "1995-12-15", "1995-12-15T00:00"
_YEAR_AND_MORE = re.compile(r"\s*(?P<year>\d{4})\s*[-–—/]\s*(?:\d{0,4}|\d\d?[-/]\d\d?(?:[T\s].*)?)\s*", re.ASCII)
_YEAR_IN_TEXT = re.compile(r"\((?P<year>\d{4})\)", re.ASCII)

# Applied before NFKC (which would tear U+00B4 and U+2033 apart) and after it (which makes U+2014 out of U+FE58).
_UNIFY = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4`", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", None),  # invisible: soft hyphen, zero width
    }
)


@dataclass(frozen=True, slots=True)
class Item:
    """One recommendable item.

    Example: Item("Heat", 1995, popularity=12, genres=("Crime",), text="A master thief and a detective ...")
    """

    title: str
    """Under a format without years (`rankgrpo.items.lines`) the whole line."""
    year: int | None = None
    """None under such a format."""
    popularity: int = 0
    """How often the item is in the training ground truth; 0 where the file does not say."""
    genres: tuple[str, ...] = ()
    text: str = ""
    """Plot or keywords, free text."""
    aliases: tuple[str, ...] = ()
    """Other titles of the same item, such as the original one; a line that names one names the item."""
    fields: tuple[tuple[str, str], ...] = ()
    """The other columns of its row, those that the format names among them; films have none."""

    @property
    def line(self) -> str:
        """The item as lists write it."""
        return title_line(self.title, self.year)


@lru_cache(maxsize=1 << 16)
def normalise_title(title: str) -> str:
    """Key under which two spellings of a title are the same title.

    NFKC, casefold, one space for any run of whitespace, typographic quotes and dashes as their ASCII forms, invisible
    characters dropped. Idempotent. Articles, accents and punctuation are kept: "Alien" is not "Aliens".
    """
    return _fold(title)


def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text.translate(_UNIFY)).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).translate(_UNIFY).split())


class Catalog:
    """Items in file order with a look-up by normalised title and year.

    Raises DataError when two items have the same normalised title and year. `rankgrpo.items.lines.LineCatalog` is the
    catalog of every other format.
    """

    item_format: ItemFormat = FILM

    def __init__(self, items: Iterable[Item]) -> None:
        self.items: tuple[Item, ...] = tuple(items)
        self._years_of: dict[str, dict[int, int]] = {}
        duplicates = []
        for index, item in enumerate(self.items):
            years = self._years_of.setdefault(normalise_title(item.title), {})
            if item.year in years:
                first = years[item.year]
                duplicates.append(f"item {index}: {item.title} ({item.year}) is item {first} again")
            years.setdefault(item.year, index)
        for (name, year), index in self._other_names().items():
            self._years_of.setdefault(name, {}).setdefault(year, index)
        self._max_words = max((key.count(" ") + 1 for key in self._years_of), default=0)
        if duplicates:
            raise DataError("the catalog names items twice; keep one of each:", duplicates)

    def _other_names(self) -> dict[tuple[str, int], int]:
        """Index by (normalised title, year) of what is not the title of an item itself, where it means one item."""
        indices: dict[tuple[str, int], set[int]] = {}
        for index, item in enumerate(self.items):
            for name in (*item.aliases, natural_order(item.title)):
                if name is not None:
                    indices.setdefault((normalise_title(name), item.year), set()).add(index)
        return {name: min(found) for name, found in indices.items() if len(found) == 1}

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __contains__(self, title_year: tuple[str, int | None]) -> bool:
        return self.lookup(*title_year) is not None

    @property
    def lines(self) -> list[str]:
        """Every item as lists write it."""
        return [item.line for item in self.items]

    def parse(self, text: str) -> list[ListedItem]:
        """Items of a ranked list, one a line with a visible character: `rankgrpo.parse.parse_list`.

        The very line of an item names it, also where it looks like another title's with a list number, a bullet or
        quotes: `7. Kreuz (1955)`.
        """
        listed = parse_list(text)
        if self._misread:
            for rank, item in enumerate(listed):
                title = self._misread.get(text[slice(*item.chars)].strip())
                if title is not None:
                    listed[rank] = ListedItem(*title, item.chars)
        return listed

    @cached_property
    def _misread(self) -> dict[str, tuple[str, int]]:
        """Title and year by the lines that `parse_list` takes something off which is the title's own."""
        misread = {}
        for item in self.items:
            # The reader takes nothing off a line without one of these, and reading each of a million takes long.
            if not item.title[:1].isalpha() or not item.title[-1:].isalnum() or "(" in item.title or "[" in item.title:
                read = [(listed.title, listed.year) for listed in parse_list(item.line)]
                if read != [(item.title, item.year)]:
                    misread[item.line] = (item.title, item.year)
        return misread

    @staticmethod
    def title_key(title: str) -> str:
        """The normalised form under which titles are compared."""
        return normalise_title(title)

    def lookup(self, title: str, year: int | None, *, year_tolerance: int = 0) -> int | None:
        """Index of the item with this title and the nearest year within `year_tolerance`, or None.

        The exact year wins; at equal distance d the later year (+d) is tried before the earlier (-d). Raises ValueError
        for a year that is no int: "1995" would otherwise match nothing, and every reward would silently be 0.
        """
        if type(year) is not int:
            raise ValueError(f"year must be an int, got {year!r} for title {title!r}; convert it when the data is read")
        if year_tolerance < 0:
            raise ValueError(f"year_tolerance must be >= 0, got {year_tolerance}")
        years = self._years_of.get(normalise_title(title))
        if years is None:
            return None
        for distance in range(year_tolerance + 1):
            for candidate in (year + distance, year - distance):
                if candidate in years:
                    return years[candidate]
        return None

    def has_title(self, index: int, title: str) -> bool:
        """Whether this is the title of the item, rather than one of its other names."""
        return normalise_title(title) == normalise_title(self.items[index].title)

    def title_indices(self, title: str) -> tuple[int, ...]:
        """Indices of every item a title names, in catalog order; empty if there is none.

        A bare title names all its remakes; "Title (Year)" names one, unless an item bears that very title.
        """
        years = self._years_of.get(normalise_title(title))
        if years is not None:
            return tuple(years.values())
        match = _TITLE_YEAR.fullmatch(title.strip())
        index = self.lookup(match["title"], int(match["year"])) if match else None
        return () if index is None else (index,)

    def find_mentions(self, text: str) -> list[int]:
        """Indices of the items written as `Title (Year)` inside free text, in order of first mention.

        The title is the longest run of words before `(Year)` that the catalog knows with that year, so
        "I like The Thing (1982)" finds "The Thing" and not "Thing". Bare titles are not searched for: "It", "Up" and
        "Her" are words first.
        """
        found: dict[int, None] = {}
        for match in _YEAR_IN_TEXT.finditer(text):
            words = _fold(text[: match.start()][-_MAX_TITLE_CHARS:]).split(" ")
            for start in range(max(0, len(words) - self._max_words), len(words)):
                years = self._years_of.get(" ".join(words[start:]).strip("\"'*_"), {})
                if int(match["year"]) in years:
                    found.setdefault(years[int(match["year"])])
                    break
        return list(found)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Catalog:
        """Read a .jsonl or .csv catalog of titles and years; raises DataError naming every bad row (`read_catalog`)."""
        return read_catalog(path)[0]

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object an item, complete or not at all (temporary file, then rename)."""
        write_lines(path, (json.dumps(_to_row(item), ensure_ascii=False) for item in self.items))


def read_catalog(path: str | os.PathLike[str]) -> tuple[Catalog, list[Problem]]:
    """Read a catalog; return it with the soft problems (unknown columns, once each).

    Columns or keys: `title`, `year` (both needed; a year may be a string), `popularity` (int), `genres` (a list, or one
    string separated by `|` or `;`), `aliases` (other titles, a list or one string separated by `|`), and free text
    under `plot`, `keywords` or `text` (several are joined by a newline). Raises DataError listing every bad row as
    `file:line: message`: broken JSON or CSV, a missing or wrongly typed field, a title with a line break (a list holds
    one title a line), a year outside 1870..2100, an item named twice.
    """
    path = Path(path)
    items: list[Item] = []
    first_line: dict[tuple[str, int], int] = {}
    errors: list[str] = []
    unknown: dict[str, Problem] = {}
    for line, row in catalog_rows(path, ("title", "year")):
        where = f"{path}:{line}"
        if isinstance(row, str):
            errors.append(f"{where}: {row}")
            continue
        for key in row.keys() - _CATALOG_KEYS:
            text = f"unknown catalog field {key!r} is not used (reported once)"
            unknown.setdefault(key, Problem("unknown fields", where, text))
        try:
            item = parse_item(row)
        except DataError as error:
            errors.append(f"{where}: {error}")
            continue
        key_year = (normalise_title(item.title), item.year)
        if key_year in first_line:
            errors.append(f"{where}: {item.title} ({item.year}) is already on line {first_line[key_year]}; keep one")
            continue
        first_line[key_year] = line
        items.append(item)
    if errors:
        raise DataError(f"{path}: {len(errors)} bad catalog row(s):", errors)
    if not items:
        raise DataError(f"{path}: the catalog is empty; it needs one item a line with title and year")
    return Catalog(items), sorted(unknown.values(), key=str)


def catalog_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, row or what is wrong with it) of a catalog file; `columns` are those that a CSV file must have.

    Raises DataError for a file of another kind and for a missing one.
    """
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv"):
        raise DataError(f"{path}: a catalog is a .jsonl or a .csv file, got {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; a catalog has one item a line with {' and '.join(columns)}")
    return read_jsonl(path) if suffix == ".jsonl" else read_csv(path, columns=columns)


# ----------------------------------------------------------------------------------------------------------------------
# Fields of a row, shared with the readers of samples and of published data sets


def parse_title(value: object) -> str:
    """A title as data files hold it; DataError says what is wrong with it."""
    if not isinstance(value, str):
        raise DataError(f"title must be a string, got {type_name(value)}")
    title = value.strip()
    if not normalise_title(title):
        raise DataError("title is empty")
    if len(title.splitlines()) > 1:
        raise DataError(f"title {title!r} holds a line break, but a list names one title a line")
    refuse_mark(title)
    return title


def refuse_mark(line: str) -> None:
    """Raise DataError for an item's line that holds a mark of thoughts, behind which a list would be cut or begin."""
    if mark := find_mark(line):
        raise DataError(f"{line!r} holds {mark}, which marks thoughts in an answer; write the item without it")


def parse_year(value: object) -> int:
    """A year from an int, a whole float or a string of either (files written by spreadsheets hold "1995.0").

    Of a span ("2008-2013") or a date ("1995-12-15") it is the first year.
    """
    span = _YEAR_AND_MORE.fullmatch(value) if isinstance(value, str) else None
    year = parse_whole(span["year"] if span else value, "year")
    if not MIN_YEAR <= year <= MAX_YEAR:
        raise DataError(f"year {year} is impossible; expected {MIN_YEAR} to {MAX_YEAR}")
    return year


def parse_whole(value: object, field: str) -> int:
    """An int from an int, a whole float or a string of either."""
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise DataError(f"{field} must be a whole number, got {value!r}") from None
    if isinstance(number, bool) or not isinstance(number, int | float) or number != number // 1:
        raise DataError(f"{field} must be a whole number, got {value!r}")
    return int(number)


_TEXT_KEYS = ("plot", "keywords", "text")
FACT_KEYS = frozenset({"popularity", "genres", "aliases", *_TEXT_KEYS})
_CATALOG_KEYS = {"title", "year", *FACT_KEYS}


def parse_item(row: Mapping[str, Any]) -> Item:
    """An item from the fields of a catalog row; DataError says what is wrong with it."""
    row = {key: value for key, value in row.items() if not is_missing(value)}
    if missing := {"title", "year"} - row.keys():
        raise DataError(f"missing {' and '.join(sorted(missing))}")
    return Item(title=parse_title(row["title"]), year=parse_year(row["year"]), **item_facts(row))


def item_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Popularity, genres and text of a catalog row, as `Item` takes them; DataError says what is wrong with them."""
    popularity = parse_whole(row.get("popularity", 0), "popularity")
    if popularity < 0:
        raise DataError(f"popularity must be >= 0, got {popularity}")
    texts = [_to_text(row[key], key) for key in _TEXT_KEYS if key in row]
    return {
        "popularity": popularity,
        "genres": _to_names(row.get("genres", ()), "genres", "|;"),
        "text": "\n".join(text for text in texts if text),
        "aliases": _to_names(row.get("aliases", ()), "aliases", "|"),
    }


def _to_names(value: object, field: str, separators: str) -> tuple[str, ...]:
    names = value
    if isinstance(value, str) and (names := parse_list_text(value, field)) is None:
        names = re.split(f"[{separators}]", value)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        between = " or ".join(separators)
        raise DataError(f"{field} must be a list of strings or one string separated by {between}, got {value!r}")
    return tuple(name.strip() for name in names if name.strip())


def _to_text(value: object, key: str) -> str:
    words = ", ".join(value) if isinstance(value, list) and all(isinstance(word, str) for word in value) else value
    if not isinstance(words, str):
        raise DataError(f"{key} must be a string or a list of strings, got {type_name(value)}")
    return words.strip()


def _to_row(item: Item) -> dict[str, Any]:
    name = dict(item.fields) if item.year is None else {"title": item.title, "year": item.year}
    row: dict[str, Any] = {**name, "popularity": item.popularity}
    if item.genres:
        row["genres"] = list(item.genres)
    if item.text:
        row["text"] = item.text
    if item.aliases:
        row["aliases"] = list(item.aliases)
    return row
