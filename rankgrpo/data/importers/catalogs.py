"""Catalogs: JSONL, CSV, or the pickle that was released with Rank-GRPO.

Unlike `read_catalog`, which refuses a file with a bad row, a row that is no item is left out and noted: published
catalogs hold a few ("The Wall", 201), and they are not the user's to mend.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from rankgrpo.data.importers.common import Notes, parse_name
from rankgrpo.errors import DataError
from rankgrpo.files.rows import is_missing, read_csv, read_jsonl, type_name
from rankgrpo.items.catalog import Item, normalise_title
from rankgrpo.items.format import FILM, ItemFormat
from rankgrpo.items.lines import make_item
from rankgrpo.items.titles import in_library_order, natural_order, split_names

LIBRARY_FRAC = 0.01
"""Share of titles that end in an article from which a catalog is one in library order."""


def read_items(path: Path, notes: Notes, item_format: ItemFormat = FILM) -> list[Item]:
    """Items of a .jsonl, .csv or .pkl catalog, in its order; what is no item, and what is there again, is noted.

    Without a year column a film's title is read as `Title (Year)`. Raises DataError for a file of another kind or one
    that holds no item.
    """
    readers = {".jsonl": read_jsonl, ".csv": _csv_rows, ".pkl": _pickle_rows, ".pickle": _pickle_rows}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: a catalog is a .jsonl, .csv or .pkl file, got {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; a catalog has one item a line with title and year")
    items = keep_items(readers[path.suffix.lower()](path), str(path), notes, item_format)
    if not items:
        needed = "a title and a year" if item_format.is_film else " and ".join(item_format.columns)
        raise DataError(f"{path}: no item in this catalog; it needs {needed} each", [str(notes)])
    return items


def keep_items(
    rows: Iterable[tuple[int, dict[str, Any] | str]], where: str, notes: Notes, item_format: ItemFormat = FILM
) -> list[Item]:
    """The items among (line, row or what is wrong with it), each title and year, or line, once."""
    items: list[Item] = []
    known: set[tuple[str, int | None]] = set()
    for line, row in rows:
        try:
            if isinstance(row, str):
                raise DataError(row)
            item = make_item(with_year(row) if item_format.is_film else row, item_format)
        except DataError as error:
            notes.add("catalog rows that are no item, left out", f"{where}:{line}: {error}")
            continue
        key = (normalise_title(item.title) if item_format.is_film else item.title, item.year)
        if key in known:
            notes.add("catalog rows that name an item again, left out", f"{where}:{line}: {item.line}")
            continue
        known.add(key)
        items.append(item)
    return items


def in_natural_order(items: Sequence[Item], notes: Notes) -> list[Item]:
    """Items under the titles that people write; the catalog's own forms and the titles in brackets become aliases.

    "Matrix, The" is The Matrix and "Seven (a.k.a. Se7en)" is Seven. In a catalog of which at least 1 % stand in library
    order, what is in brackets at the end of a title is the original title: "Postman, The (Postino, Il)". A title that
    is another item's without its brackets keeps them.
    """
    in_library = sum(in_library_order(item.title) for item in items) >= max(LIBRARY_FRAC * len(items), 2)
    taken = {(normalise_title(item.title), item.year) for item in items}
    found = []
    for item in items:
        title, others = split_names(item.title, originals=in_library)
        if (normalise_title(title), item.year) in taken:  # its own title, or another item's
            title, others = natural_order(item.title) or item.title, ()
            if (normalise_title(title), item.year) in taken:
                title = item.title
        if title != item.title:
            taken.add((normalise_title(title), item.year))
            aliases = dict.fromkeys((*item.aliases, *others, item.title))
            example = f"{item.title!r} is {title!r}"
            if in_library_order(item.title):
                notes.add("catalog titles in library order, the article moved to the front", example)
            if others:
                notes.add("catalog titles with others in brackets, by which the item is known too", example)
            item = replace(item, title=title, aliases=tuple(aliases))
        found.append(item)
    return found


def with_year(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose title holds the year, `Title (Year)`, with both apart."""
    if is_missing(row.get("year")) and isinstance(row.get("title"), str):
        title, year = parse_name(row["title"])
        return {**row, "title": title, "year": year}
    return row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    return read_csv(path, columns=())


def _pickle_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows of a pickled list, tuple or set of (title, year)."""
    with path.open("rb") as file:
        loaded = load_plain_pickle(file, str(path))
    if not isinstance(loaded, list | tuple | set | frozenset):
        raise DataError(f"{path}: expected a pickled list or set of (title, year), got {type_name(loaded)}")
    # A set has no order of its own: sorted, two imports of one file are the same.
    entries = sorted(loaded, key=repr) if isinstance(loaded, set | frozenset) else loaded
    for place, entry in enumerate(entries, start=1):
        if isinstance(entry, tuple | list) and len(entry) == 2:
            yield place, {"title": entry[0], "year": entry[1]}
        else:
            yield place, f"expected (title, year), got {entry!r:.80}"


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, tuples, sets, dicts, strings and numbers, and refuses everything that has to be imported."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"it wants to import {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise DataError("it refers to objects outside itself")


def load_plain_pickle(file: BinaryIO, name: str) -> Any:
    """The plain data of a pickle, which can run no code here; DataError for any other pickle and for broken ones."""
    try:
        return _PlainUnpickler(file).load()
    except DataError as error:
        raise DataError(f"{name}: refused, {error}; a catalog pickle holds titles and years only") from None
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        # What a broken pickle raises depends on the byte at which it breaks.
        raise DataError(f"{name}: not a whole pickle ({error}); copy it again") from None
