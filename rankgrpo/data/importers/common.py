"""What every reader hands over, what it reports, and the fields that all formats write in ways of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankgrpo.data.samples import Sample
from rankgrpo.errors import DataError
from rankgrpo.files.rows import parse_list_text, type_name
from rankgrpo.items.catalog import Catalog, Item, parse_title, parse_year
from rankgrpo.items.titles import natural_order

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
MAX_PLACES = 3
_TITLE_YEAR = re.compile(r"(?P<title>.*\S)\s*[(\[](?P<year>\d+(?:\s*[-–]\s*(?:\d{4})?)?)[)\]]", re.DOTALL)


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


def parse_groundtruth(value: object, catalog: Catalog | None, notes: Notes, where: str) -> tuple[tuple[str, int], ...]:
    """Ground truth from [[title, year], ...], ["Title (Year)", ...] or one string with `|` or line breaks between.

    A year may be a string. A title without a year takes that of the only item of its name in the catalog; what has no
    possible year is left out and noted. DataError when the field is nothing of the kind.
    """
    if catalog is not None and not catalog.item_format.is_film:
        return _parse_lines(value, catalog)
    found: dict[tuple[str, int], None] = {}
    for entry in parse_names(value, "groundtruth"):
        pair = isinstance(entry, list)
        if pair and (len(entry) != 2 or not isinstance(entry[0], str)):
            raise DataError(f'groundtruth holds {entry!r}, expected [title, year] or "Title (Year)"')
        try:
            title, year = parse_name(entry) if not pair else _title_and_year(*entry)
        except DataError as error:
            notes.add("ground-truth entries without a possible year, left out", f"{where}: {entry!r}: {error}")
            continue
        if year is None:
            named = catalog.title_indices(title) if catalog is not None else ()
            if len(named) != 1:
                notes.add("ground-truth entries without a year, left out", f"{where}: {title!r}")
                continue
            year = catalog.items[named[0]].year
            notes.add("ground-truth entries without a year, taken from the catalog", f"{where}: {title} ({year})")
        index = _lookup(catalog, title, year) if catalog is not None else None
        # An item has one name in a data set, the catalog's; other spellings of it stay as they are.
        if index is not None and not catalog.has_title(index, title):
            title = catalog.items[index].title
        found.setdefault((title, year))
    return tuple(found)


def _parse_lines(value: object, catalog: Catalog) -> tuple[tuple[str, None], ...]:
    """Ground truth of a format without years: lines, or objects with the columns that the format names.

    A line that the catalog knows is spelt as there.
    """
    template = catalog.item_format.template
    entries = parse_list_text(value) if isinstance(value, str) else value
    if entries is None:
        entries = parse_names(value, "groundtruth")
    found: dict[tuple[str, None], None] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, dict):
            entry = catalog.item_format.write(entry)
        if not isinstance(entry, str):
            raise DataError(f"groundtruth holds {entry!r}, expected lines {template!r} or objects with these columns")
        index = catalog.lookup(parse_title(entry), None)
        found.setdefault((parse_title(entry) if index is None else catalog.items[index].title, None))
    return tuple(found)


def _lookup(catalog: Catalog, title: str, year: int) -> int | None:
    """Index of an item, its title perhaps in library order."""
    names = (title, natural_order(title))
    return next((i for name in names if name and (i := catalog.lookup(name, year)) is not None), None)


def _title_and_year(title: str, year: object) -> tuple[str, int | None]:
    if year is None or (isinstance(year, str) and not year.strip()):
        return parse_title(title), None
    return parse_title(title), parse_year(year)


def parse_seen(value: object, notes: Notes, where: str) -> tuple[str, ...]:
    """Seen titles from a list of titles or [title, year], or one string; each once, what is no title noted.

    A year is dropped: a seen film is never a hit, whatever its year.
    """
    titles: dict[str, None] = {}
    for entry in parse_names(value, "seen_titles"):
        try:
            titles.setdefault(parse_title(entry if isinstance(entry, str) else entry[0]))
        except DataError as error:
            notes.add("seen titles that are none, left out", f"{where}: {entry!r}: {error}")
    return tuple(titles)


def parse_names(value: object, field: str) -> list[Any]:
    """The entries of a list, or of one string that is a list or separates them by `|` or line breaks."""
    if isinstance(value, str) and (listed := parse_list_text(value)) is not None:
        value = listed
    if isinstance(value, str):
        return [name.strip() for name in re.split(r"[|\n]", value) if name.strip()]
    if not isinstance(value, list):
        raise DataError(f"{field} must be a list, or one string separated by |, got {type_name(value)}")
    if wrong := [entry for entry in value if not isinstance(entry, str) and not (isinstance(entry, list) and entry)]:
        raise DataError(f"{field} holds {wrong[0]!r}, expected titles")
    return value
