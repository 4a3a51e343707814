"""The lines of a teacher's reply that name items, one an item, whatever shape the reply has.

Asked for a line an item and nothing else, models also answer with a JSON array, a table, ten titles between commas,
numbered lines with remarks under each, a sentence before and advice after. A line is never made of two items, nor two
of one: where commas could be either, the catalog decides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

Knows = Callable[[str], bool]
"""Whether a line names an item of the catalog."""

_FENCE = re.compile(r"^[ \t]*(```|~~~).*$", re.MULTILINE)
_NUMBERED = re.compile(r"(?P<indent>\s*)(?:[*_]{0,3}#?\d{1,3}(?:[.)]|\.\))[*_]{0,3}\s*)(?=\S)")
_BULLETED = re.compile(r"(?P<indent>\s*)(?:[-–*+•●▪◦‣·]\s+|[•●▪◦‣·])(?=\S)")
_SEPARATOR_ROW = re.compile(r"\s*\|?(?:\s*:?-{2,}:?\s*\|)+\s*(?::?-{2,}:?\s*)?")
_YEAR = r"[(\[]\s*\d{4}\s*[)\]]"
_ENDS_IN_YEAR = re.compile(rf"(?:(?!{_YEAR}).)*{_YEAR}[\"'”*_]*")
_AFTER_YEAR = re.compile(r"(?<=[)\]])(?:[\"'”*_]*)(?:\s*[,;|·•/]\s*(?:and\s+|&\s+)?|\s+and\s+|\s+&\s+)")
_PREAMBLE = re.compile(
    r"\s*(?:sure|certainly|of course|absolutely|great|okay|ok|here|these|below|i(?:'d| would)?\s+(?:recommend|suggest)"
    r"|my|based on|some|you (?:might|may|could)|recommend)\b[^\n]{0,200}?:\s+(?=\S)",
    re.IGNORECASE,
)
_TITLE_NAMES = (
    "title",
    "movie",
    "film",
    "name",
    "item",
    "song",
    "track",
    "book",
    "product",
    "movie title",
    "movie name",
)
_YEAR_NAMES = ("year", "release_year", "release year", "released", "release")
MIN_ITEMS = 3
"""Items between commas from which a line is a list of them."""
MANY_WORDS = 10
"""A line of so many words that ends as sentences do is none of a list."""


def item_lines(reply: str, knows: Knows) -> str:
    """The lines of a reply that may name an item, one an item. `knows` decides where a comma may belong to a title."""
    text = _FENCE.sub("", reply).strip()
    listed = _json_lines(text)
    if listed is None:
        lines = [line for line in text.splitlines() if line.strip()]
        listed = _table_lines(lines, knows) or _marked_lines(lines) or _plain_lines(lines, knows)
        listed = [part for line in listed for part in _split_line(line, knows, alone=len(listed) == 1)]
    return "\n".join(listed)


# ----------------------------------------------------------------------------------------------------------------------
# JSON


def _json_lines(text: str) -> list[str] | None:
    """Items of the JSON array in a text, alone or in an object; None where there is none that names any."""
    for first, last in (("[", "]"), ("{", "}")):
        start, end = text.find(first), text.rfind(last)
        if 0 <= start < end:
            try:
                value = json.loads(text[start : end + 1])
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                value = next((entry for entry in value.values() if isinstance(entry, list)), [])
            lines = [line for entry in value if (line := _json_item(entry))]
            if lines and len(lines) == len(value):
                return lines
    return None


def _json_item(entry: Any) -> str | None:
    if isinstance(entry, dict):
        named = {str(name).lower(): value for name, value in entry.items()}
        title = next((named[name] for name in _TITLE_NAMES if isinstance(named.get(name), str)), None)
        title = title or next((value for value in named.values() if isinstance(value, str)), None)
        year = next((named[name] for name in _YEAR_NAMES if named.get(name) is not None), None)
        entry = [title, year]
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
        return _with_year(entry[0], "" if entry[1] is None else str(entry[1]))
    return " ".join(entry.split()) if isinstance(entry, str) and entry.strip() else None


def _with_year(title: str, year: str) -> str:
    title, year = " ".join(title.split()), year.strip(" ()[]*_")
    return f"{title} ({year})" if re.fullmatch(r"\d{4}", year) and not re.search(rf"{_YEAR}\s*$", title) else title


# ----------------------------------------------------------------------------------------------------------------------
# Tables, numbers, bullets


def _table_lines(lines: Sequence[str], knows: Knows) -> list[str]:
    """Items of a Markdown table; nothing where there is none."""
    place = next((n for n, line in enumerate(lines) if n > 0 and "|" in line and _SEPARATOR_ROW.fullmatch(line)), None)
    if place is None:
        return []
    header = [name.strip(" *_`").lower() for name in _cells(lines[place - 1])]
    rows = [cells for line in lines[place + 1 :] if "|" in line and len(cells := _cells(line)) == len(header)]
    title = next((header.index(name) for name in _TITLE_NAMES if name in header), None)
    if title is None:
        title = next(
            (n for n, name in enumerate(header) if any(word in name for word in ("title", "movie", "film"))), None
        )
    if title is None:  # the column that names most items
        found = [sum(knows(cells[n]) or bool(re.search(_YEAR, cells[n])) for cells in rows) for n in range(len(header))]
        title = found.index(max(found)) if any(found) else None
    if title is None:
        return []
    year = next((header.index(name) for name in _YEAR_NAMES if name in header), None)
    return [_with_year(cells[title], cells[year] if year is not None else "") for cells in rows if cells[title]]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _marked_lines(lines: Sequence[str]) -> list[str]:
    """The outermost numbered lines, or else bulleted ones, where there are several; what stands between is no item."""
    for mark in (_NUMBERED, _BULLETED):
        marked = [(match, line) for line in lines if (match := mark.match(line))]
        if len(marked) >= 2:
            indent = min(len(match["indent"].expandtabs()) for match, _ in marked)
            return [line for match, line in marked if len(match["indent"].expandtabs()) <= indent]
    return []


def _plain_lines(lines: Sequence[str], knows: Knows) -> list[str]:
    """All lines but the sentences around the list."""
    kept = []
    for line in lines:
        bare = line.strip(" *_#>")
        is_sentence = bare.endswith((".", "!", "?")) and len(bare.split()) >= MANY_WORDS
        if (bare.endswith(":") or is_sentence) and not re.search(_YEAR, line) and bare.count(",") < MIN_ITEMS:
            if not knows(bare.rstrip(":")):
                continue
        kept.append(line)
    return kept


# ----------------------------------------------------------------------------------------------------------------------
# Several items on a line


def _split_line(line: str, knows: Knows, *, alone: bool) -> list[str]:
    """The items of a line: several where a comma follows the year of each, or where a line that is alone has commas."""
    rest = line[match.end() :] if (match := _PREAMBLE.match(line)) else line
    parts = [part.strip() for part in _AFTER_YEAR.split(rest) if part.strip()]
    # One year each, at the end: what is said of one item may name others.
    if len(parts) >= MIN_ITEMS and all(_ENDS_IN_YEAR.fullmatch(part) for part in parts[:-1]):
        return parts
    if knows(line) or not alone:
        return [line]
    pieces = [piece.strip() for piece in re.split(r"[,;]", rest.strip().rstrip(".")) if piece.strip()]
    pieces = [
        re.sub(r"^(?:and|&)\s+(?=\S)", "", piece) if n == len(pieces) - 1 else piece for n, piece in enumerate(pieces)
    ]
    if len(pieces) < MIN_ITEMS or max(len(piece.split()) for piece in pieces) > MANY_WORDS:
        return [line]
    return _joined(pieces, knows)


def _joined(pieces: Sequence[str], knows: Knows) -> list[str]:
    """Pieces between commas, those together again that are one item of the catalog: The Good, the Bad and the Ugly."""
    found = []
    place = 0
    while place < len(pieces):
        ends = range(min(len(pieces), place + 4), place, -1)
        end = next((end for end in ends if end > place + 1 and knows(", ".join(pieces[place:end]))), place + 1)
        found.append(", ".join(pieces[place:end]))
        place = end
    return found
