"""The catalog of a format without years: an item is the line that names it.

A line is read strictly first and then with more and more allowance; the first reading that names one item decides:

1. the line as it stands, spaces at its ends apart: a title may begin with a number and wear quotes of its own;
2. without the list number, bullet, emphasis, quotes and the end of a sentence, as `rankgrpo.parse` removes them;
3. the part at the beginning that emphasis or quotes mark, with anything after it;
4. what stands before a mark that begins a comment (` - `, `: `, ` (`, ` [`, ` | `, `; `), if no item of the catalog has
   that mark in its line, so that it cannot be part of a title;
5. what ends with the bracket with which every line of the catalog ends, with anything after it.

Every reading is compared exactly, then under `normalise_title`. Items that are the same under it are told apart by
their exact spelling; a line that has neither spelling names none of them.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rankgrpo.errors import DataError
from rankgrpo.files.rows import Problem, is_missing
from rankgrpo.items.catalog import (
    FACT_KEYS,
    Catalog,
    Item,
    catalog_rows,
    item_facts,
    normalise_title,
    parse_item,
    read_catalog,
    refuse_mark,
)
from rankgrpo.items.format import FILM, ItemFormat
from rankgrpo.parse import ListedItem, bare_title, visible_lines

COMMENT_MARKS = (" - ", ": ", " (", " [", " | ", "; ")
CLOSING = ")]}>"
MAX_ENDS = 8  # closing brackets of a line at which an item may end

_SENTENCE_END = " .,;:!?"
_MARKED = re.compile(r"""(?P<mark>\*{1,3}|_{1,3}|`|["“”„«»]) (?P<inner>.+?) (?:(?P=mark)|["“”„«»])""", re.VERBOSE)
_EDGES = "\"'“”„«»*_`()[]"
_ENDS = _SENTENCE_END + _EDGES
_WORD = re.compile(r"[^\W_]+")


class LineCatalog(Catalog):
    """Items in file order, looked up by the line that names them. `year` is None wherever one is asked for.

    Raises DataError when two items have the same line.
    """

    def __init__(self, items: Iterable[Item], item_format: ItemFormat) -> None:
        self.items = tuple(items)
        self.item_format = item_format
        self._of_line: dict[str, int] = {}
        self._of_key: dict[str, list[int]] = {}
        duplicates = []
        for index, item in enumerate(self.items):
            if item.year is not None:
                raise ValueError(f"item {index}, {item.title!r}: a format without years has no year, got {item.year}")
            first = self._of_line.setdefault(item.title, index)
            if first != index:
                duplicates.append(f"item {index}: {item.title} is item {first} again")
            self._of_key.setdefault(normalise_title(item.title), []).append(index)
        if duplicates:
            raise DataError("the catalog names items twice; keep one of each:", duplicates)
        aliases: dict[str, set[int]] = {}
        for index, item in enumerate(self.items):
            for alias in item.aliases:
                aliases.setdefault(normalise_title(alias), set()).add(index)
        # A spelling of an item's own line is no other's alias, and what two items share is nobody's.
        self._of_alias = {a: min(of) for a, of in aliases.items() if len(of) == 1 and a not in self._of_key}

    def lookup(self, title: str, year: int | None = None, *, year_tolerance: int = 0) -> int | None:
        """Index of the item with this line, exactly or as the only one alike under `normalise_title`, else of the one
        with this alias, else None."""
        if year is not None:
            raise ValueError(f"year must be None where the format of an item has none, got {year!r} for {title!r}")
        index = self._of_line.get(title)
        if index is None:
            key = normalise_title(title)
            alike = self._of_key.get(key)
            index = self._of_alias.get(key) if alike is None else alike[0] if len(alike) == 1 else None
        return index

    def title_indices(self, title: str) -> tuple[int, ...]:
        """The item whose line this is; else all whose column `title` this is. Empty if there is none."""
        index = self.lookup(title.strip())
        return self._of_title.get(normalise_title(title), ()) if index is None else (index,)

    def parse(self, text: str) -> list[ListedItem]:
        """Items of a ranked list, one a line with a visible character; see the head of this module.

        A line that names an item has that item's own spelling as its title. Any other has what it says without its
        list number and decoration, or None where that does not have the form of the format.
        """
        items = []
        for line, chars in visible_lines(text):
            title, index = self.read(line)
            if index is not None:
                title = self.items[index].title
            elif not self.item_format.reads(title):
                title = None
            items.append(ListedItem(title, None, chars))
        return items

    def read(self, line: str) -> tuple[str, int | None]:
        """(what the line says without number and decoration, index of the item that it names or None)."""
        bare = ""
        for place, reading in enumerate(self._readings(line)):
            index = self.lookup(reading)
            if index is not None:
                return reading, index
            bare = reading if place < 2 and reading else bare
        return bare, None

    def _readings(self, line: str) -> Iterator[str]:
        line = line.strip()
        yield line
        bare = bare_title(line)
        yield bare
        yield bare.rstrip(_SENTENCE_END)
        for form in dict.fromkeys((bare, line)):  # `[7] and why`: what looks like a list number may be the item
            yield from self._beginnings(form)

    def _beginnings(self, line: str) -> Iterator[str]:
        """What a line may name when more than an item stands on it."""
        if match := _MARKED.match(line):
            yield match["inner"].strip(_SENTENCE_END)
        folded = normalise_title(line)
        for mark in self._comment_marks:
            head, found, _ = folded.partition(mark)
            if found:
                yield head
        if self._closing:
            ends = [place + 1 for place, char in enumerate(folded) if char in self._closing][:MAX_ENDS]
            for end in reversed(ends):
                if folded[end : end + 1] not in self._goes_on.get(folded[:end], ()):
                    yield folded[:end]

    def find_mentions(self, text: str) -> list[int]:
        """Indices of the items whose lines stand in free text, in order of first mention; the longest line wins.

        Lines that may be words first are not searched for: of a format with one column those of less than three
        words, unless they hold a digit beside a bracket or underscore, as semantic ids do.
        """
        words = normalise_title(text).split(" ")
        found: dict[int, None] = {}
        place = 0
        while place < len(words):
            num_words, index = self._mention_at(words, place)
            if index is not None:
                found.setdefault(index)
            place += num_words
        return list(found)

    def _mention_at(self, words: list[str], place: int) -> tuple[int, int | None]:
        """(words taken, item) of the longest line that begins at a word."""
        for first in dict.fromkeys((words[place], words[place].lstrip(_EDGES))):
            for num_words in self._lengths_of.get(first.rstrip(_ENDS), ()):
                if place + num_words <= len(words):
                    written = " ".join([first, *words[place + 1 : place + num_words]])
                    for reading in (written, written.rstrip(_SENTENCE_END), written.rstrip(_ENDS)):
                        if reading in self._mentioned:
                            return num_words, self._mentioned[reading]
        return 1, None

    @cached_property
    def _mentioned(self) -> dict[str, int]:
        """Lines that are searched for in text, normalised; of items alike none."""
        wide = len(self.item_format.columns) > 1
        keys = ((key, alike[0]) for key, alike in self._of_key.items() if len(alike) == 1)
        return {key: index for key, index in keys if wide or _is_telling(key)}

    @cached_property
    def _lengths_of(self) -> dict[str, tuple[int, ...]]:
        """By first word the numbers of words that lines beginning with it have, longest first."""
        lengths: dict[str, set[int]] = {}
        for key in self._mentioned:
            words = key.split(" ")
            lengths.setdefault(words[0].rstrip(_ENDS), set()).add(len(words))
        return {word: tuple(sorted(counts, reverse=True)) for word, counts in lengths.items()}

    @cached_property
    def _of_title(self) -> Mapping[str, tuple[int, ...]]:
        """Items by their column `title`, where it is not the whole line."""
        found: dict[str, tuple[int, ...]] = {}
        for index, item in enumerate(self.items):
            title = dict(item.fields).get("title")
            if title is not None and title != item.title:
                key = normalise_title(title)
                found[key] = (*found.get(key, ()), index)
        return found

    @cached_property
    def _comment_marks(self) -> tuple[str, ...]:
        keys = [*self._of_key, *(normalise_title(alias) for item in self.items for alias in item.aliases)]
        return tuple(mark for mark in COMMENT_MARKS if not any(mark in key for key in keys))

    @cached_property
    def _closing(self) -> str:
        """The bracket with which all lines end, or nothing."""
        last = {key[-1:] for key in self._of_key}
        return last.pop() if len(last) == 1 and last <= set(CLOSING) else ""

    @cached_property
    def _goes_on(self) -> dict[str, set[str]]:
        """By line that longer lines begin with, how they go on: what goes on so names one of those or nothing."""
        goes_on: dict[str, set[str]] = {}
        for key in [*self._of_key, *self._of_alias]:
            for place, char in enumerate(key[:-1], 1):
                if char in self._closing and (key[:place] in self._of_key or key[:place] in self._of_alias):
                    goes_on.setdefault(key[:place], set()).add(key[place])
        return goes_on

    @property
    def alike(self) -> list[tuple[int, ...]]:
        """Groups of items whose lines are the same under `normalise_title`: they are read by exact spelling only."""
        return [tuple(indices) for indices in self._of_key.values() if len(indices) > 1]


# ----------------------------------------------------------------------------------------------------------------------
# Catalogs of any format


def make_catalog(items: Iterable[Item], item_format: ItemFormat = FILM) -> Catalog:
    """The catalog of these items under a format."""
    return Catalog(items) if item_format.is_film else LineCatalog(items, item_format)


def make_item(row: Mapping[str, Any], item_format: ItemFormat) -> Item:
    """The item of a catalog row under a format; DataError says what is wrong with it.

    Film rows need title and year (`parse_item`), others the columns that the format names. What else a row says in
    words and numbers is kept in `Item.fields`.
    """
    if item_format.is_film:
        return parse_item(row)
    line = item_format.write(row)
    row = {key: value for key, value in row.items() if not is_missing(value)}
    if not normalise_title(line):
        raise DataError(f"data.item = {item_format.template!r} writes an empty line")
    refuse_mark(line)
    named = {name.lower() for name in item_format.columns}
    fields = tuple(
        (key, str(value).strip())
        for key, value in row.items()
        if (key not in FACT_KEYS or key.lower() in named) and isinstance(value, str | int | float)
    )
    facts = {key: value for key, value in row.items() if key in FACT_KEYS}
    return Item(line, None, fields=fields, **item_facts(facts))


def open_catalog(path: str | os.PathLike[str], item_format: ItemFormat = FILM) -> tuple[Catalog, list[Problem]]:
    """Read a catalog file under a format; return it with what looks wrong and does not stop its use.

    Columns are those of `read_catalog`, but title and year are needed by the film format alone: any other needs the
    columns that it names. Rows that come out as one line are one item with the sum of their popularity, and a problem
    each. Raises DataError listing every bad row as `file:line: message`.
    """
    if item_format.is_film:
        return read_catalog(path)
    path = Path(path)
    items: dict[str, Item] = {}
    first_line: dict[str, int] = {}
    errors: list[str] = []
    problems: list[Problem] = []
    for line, row in catalog_rows(path, [name.lower() for name in item_format.columns]):
        where = f"{path}:{line}"
        try:
            if isinstance(row, str):
                raise DataError(row)
            item = make_item(row, item_format)
        except DataError as error:
            errors.append(f"{where}: {error}")
            continue
        if (known := items.get(item.title)) is not None:
            items[item.title] = replace(known, popularity=known.popularity + item.popularity)
            text = f"{item.title!r} is already on line {first_line[item.title]}; the two rows are one item"
            problems.append(Problem("catalog rows that come out as one line", where, text))
            continue
        items[item.title], first_line[item.title] = item, line
    if errors:
        raise DataError(f"{path}: {len(errors)} bad catalog row(s) under data.item = {item_format.template!r}:", errors)
    if not items:
        raise DataError(f"{path}: the catalog is empty; an item a line has {' and '.join(item_format.columns)}")
    return LineCatalog(items.values(), item_format), problems


class LineMatcher:
    """Lines as other models write them, for teachers: as `LineCatalog.read`, then by words alone.

    Without accents and punctuation a line must be that of one item. Rewards do not use this.
    """

    def __init__(self, catalog: LineCatalog) -> None:
        self._catalog = catalog
        self._of_words: dict[tuple[str, ...], list[int]] = {}
        for index, item in enumerate(catalog.items):
            self._of_words.setdefault(_words(item.title), []).append(index)

    def match_line(self, line: str) -> int | None:
        """Index of the item that a line names, or None."""
        title, index = self._catalog.read(line)
        if index is not None:
            return index
        words = _words(title)
        alike = self._of_words.get(words, ()) if words else ()
        return alike[0] if len(alike) == 1 and normalise_title(title) not in self._catalog._of_key else None


def _words(line: str) -> tuple[str, ...]:
    plain = "".join(c for c in unicodedata.normalize("NFKD", normalise_title(line)) if not unicodedata.combining(c))
    return tuple(_WORD.findall(plain.replace("'", "")))


def _is_telling(key: str) -> bool:
    num_words = key.count(" ") + 1
    return num_words > 2 or (any(c.isdecimal() for c in key) and any(c in "<>[]{}_" for c in key))
