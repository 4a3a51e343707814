"""What every reader hands over, what it reports, and the fields that all formats write in ways of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankgrpo.data.samples import Candidate, Sample, join_candidates, join_weights, split_weight
from rankgrpo.errors import DataError
from rankgrpo.files.rows import parse_list_text, type_name
from rankgrpo.items.catalog import Catalog, Item, parse_title, parse_year
from rankgrpo.items.format import FILM, title_line
from rankgrpo.items.titles import natural_order

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
MAX_PLACES = 3
_ENTRIES = {"groundtruth": "ground-truth entries", "candidates": "candidates"}
_TITLE_YEAR = re.compile(r"(?P<title>.*\S)\s*[(\[](?P<year>\d+(?:\s*[-–]\s*(?:\d{4})?)?)[)\]]", re.DOTALL)
_YEAR = re.compile(r"[(\[]\d{4}[)\]]")
# What separates films in a text, right behind the year of one.
_BEHIND_FILM = re.compile(r"(?<=[(\[]\d{4}[)\]])\s*[,;/]\s*")


class Notes:
    """What was left out or changed while reading, by kind: how often, and the first places.

    Example: notes.add("films without a year, left out", "movie 203371: 'Up'")
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._places: dict[str, list[str]] = {}

    def add(self, kind: str, where: str, count: int = 1) -> None:
        if count:
            self._counts[kind] = self._counts.get(kind, 0) + count
            places = self._places.setdefault(kind, [])
            if len(places) < MAX_PLACES:
                places.append(where)

    def count(self, kind: str) -> int:
        return self._counts.get(kind, 0)

    def __str__(self) -> str:
        lines = []
        for kind, count in self._counts.items():
            first, *others = self._places[kind]
            lines += [f"{count} {kind}; the first: {first}", *(f"  then {place}" for place in others)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Imported:
    """What a reader found. Splits that the source does not have are missing, and made by the caller."""

    what: str
    """The format and its place, in words."""
    splits: Mapping[str, list[Sample]]
    items: Sequence[Item] = ()
    """The source's own catalog; empty where it has none."""
    notes: Notes = field(default_factory=Notes)


def split_name(name: str) -> str | None:
    """ "validation" for "valid", "val" or "dev"; None for what names no split."""
    return SPLIT_NAMES.get(name.strip().lower())


def parse_name(name: str) -> tuple[str, int | None]:
    """(title, year) of "Heat (1995)"; the year is None where there is none. DataError for one that cannot be."""
    name = " ".join(name.split())
    match = _TITLE_YEAR.fullmatch(name)
    # "Apollo (13)" is a title; digits that could be meant as a year, or years, are one, possible or not.
    if match and len(match["year"]) >= 3:
        return parse_title(match["title"]), parse_year(match["year"])
    return parse_title(name), None


def parse_groundtruth(
    value: object, catalog: Catalog | None, notes: Notes, where: str
) -> tuple[tuple[tuple[str, int | None], ...], tuple[float, ...]]:
    """The items to find and their weights, as `Sample` has them; an entry may carry a weight as in a data set folder.

    Of films: from [[title, year], ...], ["Title (Year)", ...], objects with `title` and `year`, or one string with `|`
    or line breaks between. A year may be a string. A title without a year takes that of the only item of its name in
    the catalog; what has no possible year is left out and noted. Of a format without years: from lines, or objects with
    the columns that the format names; a line that the catalog knows is spelt as there. DataError when the field is
    nothing of the kind.
    """
    item_format = FILM if catalog is None else catalog.item_format
    weighted = []
    for place, entry in enumerate(_entries(value, "groundtruth", catalog, notes, where)):
        entry, weight = split_weight(entry, f"groundtruth[{place}]", item_format)
        item = _parse_item(entry, "groundtruth", catalog, notes, where)
        if item is not None:
            weighted.append((item, weight))
    return join_weights(weighted)


def parse_candidates(value: object, catalog: Catalog | None, notes: Notes, where: str) -> tuple[Candidate, ...]:
    """Candidates from items written as in `parse_groundtruth`; objects may have a `text` beside the item."""
    entries = _entries(value, "candidates", catalog, notes, where)
    read = ((_parse_item(entry, "candidates", catalog, notes, where), entry) for entry in entries)
    return join_candidates((item, entry) for item, entry in read if item is not None)


def _parse_item(
    entry: object, field: str, catalog: Catalog | None, notes: Notes, where: str
) -> tuple[str, int | None] | None:
    """The item of an entry under the catalog's title; None, and noted, for a film without a year."""
    if catalog is not None and not catalog.item_format.is_film:
        return _parse_line(entry, field, catalog)
    kind = f"{_ENTRIES[field]} without"
    if isinstance(entry, dict):
        entry = entry["item"] if "item" in entry else [entry.get("title"), entry.get("year")]
    pair = isinstance(entry, list)
    if not isinstance(entry, str) and not (pair and len(entry) == 2 and isinstance(entry[0], str)):
        raise DataError(f'{field} holds {entry!r}, expected [title, year] or "Title (Year)"')
    try:
        title, year = parse_name(entry) if not pair else _title_and_year(*entry)
    except DataError as error:
        notes.add(f"{kind} a possible year, left out", f"{where}: {entry!r}: {error}")
        return None
    if year is None:
        named = catalog.title_indices(title) if catalog is not None else ()
        if len(named) != 1:
            notes.add(f"{kind} a year, left out", f"{where}: {title!r}")
            return None
        year = catalog.items[named[0]].year
        notes.add(f"{kind} a year, taken from the catalog", f"{where}: {title} ({year})")
    index = _lookup(catalog, title, year) if catalog is not None else None
    # An item has one name in a data set, the catalog's; other spellings of it stay as they are.
    if index is not None and not catalog.has_title(index, title):
        title = catalog.items[index].title
    if index is None and _YEAR.search(title):
        notes.add("films whose title holds a year, taken as one film each", f"{where}: {title_line(title, year)}")
    return title, year


def _parse_line(entry: object, field: str, catalog: Catalog) -> tuple[str, None]:
    """The item of an entry under a format without years."""
    item_format = catalog.item_format
    if isinstance(entry, dict):
        own = "item" in entry and "item" not in item_format.columns
        entry = entry["item"] if own else item_format.write(entry)
    if not isinstance(entry, str):
        expected = f"lines {item_format.template!r} or objects with these columns"
        raise DataError(f"{field} holds {entry!r}, expected {expected}")
    index = catalog.lookup(parse_title(entry), None)
    return (parse_title(entry) if index is None else catalog.items[index].title), None


def _lookup(catalog: Catalog, title: str, year: int) -> int | None:
    """Index of an item, its title perhaps in library order."""
    names = (title, natural_order(title))
    return next((i for name in names if name and (i := catalog.lookup(name, year)) is not None), None)


def _title_and_year(title: str, year: object) -> tuple[str, int | None]:
    if year is None or (isinstance(year, str) and not year.strip()):
        return parse_title(title), None
    return parse_title(title), parse_year(year)


def parse_seen(value: object, catalog: Catalog | None, notes: Notes, where: str) -> tuple[str, ...]:
    """Seen titles from a list of titles or [title, year], or one string; each once, what is no title noted.

    A year that is given stays with its film: of several films of one title it says which was seen.
    """
    is_film = catalog is None or catalog.item_format.is_film
    titles: dict[str, None] = {}
    for entry in _entries(value, "seen_titles", catalog, notes, where):
        if not isinstance(entry, str) and not (isinstance(entry, list) and entry):
            raise DataError(f"seen_titles holds {entry!r}, expected titles")
        try:
            titles.setdefault(parse_title(entry) if isinstance(entry, str) else _seen_line(*entry[:2], is_film=is_film))
        except DataError as error:
            notes.add("seen titles that are none, left out", f"{where}: {entry!r}: {error}")
    return tuple(titles)


def _seen_line(title: object, year: object = None, *, is_film: bool) -> str:
    """The line of a film of which the year is possible, else the title alone."""
    title = parse_title(title)
    try:
        return title_line(*_title_and_year(title, year)) if is_film else title
    except DataError:  # without a year all films of the title count as seen
        return title


def _entries(value: object, field: str, catalog: Catalog | None, notes: Notes, where: str) -> list[Any]:
    """The entries of a list, or of one string that is a list or separates them by `|` or line breaks.

    Films that one text names with their years, a comma, semicolon or slash between, are several entries, unless the
    catalog has a film of the whole text.
    """
    if isinstance(value, str) and (listed := parse_list_text(value, field, of_names=True)) is not None:
        value = listed
    if isinstance(value, str):
        value = [name.strip() for name in re.split(r"[|\n]", value) if name.strip()]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{field} must be a list, or one string separated by |, got {type_name(value)}")
    if catalog is not None and not catalog.item_format.is_film:
        return value
    found: list[Any] = []
    for entry in value:
        films = [film for film in _BEHIND_FILM.split(entry) if film] if isinstance(entry, str) else [entry]
        is_one = len(films) < 2 or not all(map(_TITLE_YEAR.fullmatch, films))
        if is_one or (catalog is not None and catalog.title_indices(entry)):
            found.append(entry)
        else:
            notes.add("texts that name several films, taken apart", f"{where}: {entry!r}")
            found += films
    return found
