"""How an item is written as one line of a list, from the columns of the catalog: `data.item`.

`{title} ({year})` is the film format: an item is a title and a year there, lines are read by `rankgrpo.parse`, and
the years have rules of their own (`Catalog.lookup`). Under every other format an item is its line: what stands in a
`title` is the whole line, and there is no year (`rankgrpo.items.lines`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from rankgrpo.errors import ConfigError, DataError
from rankgrpo.files.rows import is_missing
from rankgrpo.files.template import PLACEHOLDER, item_problem, placeholders

FILM_TEMPLATE = "{title} ({year})"


def title_line(title: str, year: int | None = None) -> str:
    """An item as the lists write it: `Title (Year)`, or the line that `title` is where the format has no year."""
    return title if year is None else f"{title} ({year})"


@dataclass(frozen=True)
class ItemFormat:
    """A template with the names of catalog columns between braces. Raises ConfigError for one that can write no item.

    Example: ItemFormat("{title} by {author}").write({"title": "Emma", "author": "Jane Austen"})
    """

    template: str = FILM_TEMPLATE

    def __post_init__(self) -> None:
        if problem := item_problem(self.template):
            raise ConfigError(f"data.item = {self.template!r} {problem}")

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns named, each once."""
        return placeholders(self.template)

    @property
    def is_film(self) -> bool:
        """Whether items are titles with years."""
        return self.template == FILM_TEMPLATE

    def write(self, row: Mapping[str, object]) -> str:
        """The line of a catalog row: its columns as they are, but for spaces, of which runs become one.

        Raises DataError naming the columns that are missing or empty, and one that holds a line break.
        """
        cells = {name: row.get(name, row.get(name.lower())) for name in self.columns}
        missing = [name for name in self.columns if name not in row and name.lower() not in row]
        empty = [name for name in self.columns if name not in missing and not _text(cells[name])]
        if missing or empty:
            faults = [f"no {' and no '.join(missing)}"] if missing else []
            faults += [f"an empty {' and an empty '.join(empty)}"] if empty else []
            raise DataError(
                f"{' and '.join(faults)}, which data.item = {self.template!r} names; the row has "
                f"{', '.join(map(str, row)) or 'nothing'}"
            )
        for name, cell in cells.items():
            if not isinstance(cell, str | int | float) or isinstance(cell, bool):
                raise DataError(f"{name} must be text or a number, got {cell!r:.80}")
            if len(str(cell).strip().splitlines()) > 1:
                raise DataError(f"{name} {cell!r} holds a line break, but a list names one item a line")
        return PLACEHOLDER.sub(lambda match: _text(cells[match[1]]), self.template).strip()

    def reads(self, line: str) -> bool:
        """Whether a line has the form of the template: its literal parts, in order, with text where columns stand."""
        return self._pattern.fullmatch(line.strip()) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pieces = PLACEHOLDER.split(self.template.strip())  # literal, column, literal, ...
        literals = [r"\s+".join(map(re.escape, re.split(r"\s+", piece))) for piece in pieces[::2]]
        return re.compile(r".*\S.*".join(literals), re.IGNORECASE)


FILM = ItemFormat()


def _text(value: object) -> str:
    if is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # spreadsheets write 1995.0
    return " ".join(str(value).split())
