"""The items that a log refers to by a key, and samples that name them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rankgrpo.data.importers.catalogs import in_natural_order, with_year
from rankgrpo.data.importers.common import Notes, parse_name
from rankgrpo.data.importers.logs import key_of, table_rows
from rankgrpo.errors import DataError
from rankgrpo.files.rows import is_missing
from rankgrpo.items.catalog import Item, normalise_title, parse_title
from rankgrpo.items.format import ItemFormat
from rankgrpo.items.lines import make_catalog, make_item


class ItemTable:
    """Items by the key under which a log names them."""

    def __init__(self, item_format: ItemFormat, path: Path | None = None, key: str = "") -> None:
        self.format, self.path, self.key = item_format, path, key
        self.items: list[Item] = []
        self._of_key: dict[str, int] = {}
        self._of_line: dict[tuple[str, int | None], int] = {}

    @classmethod
    def read(cls, path: Path, item_format: ItemFormat, key: str, notes: Notes, *, drop_bad: bool = False) -> ItemTable:
        """Read a table. Raises DataError naming every row that is no item (left out with `drop_bad`), and every key
        that stands twice."""
        rows, errors = [], []
        for line, row in table_rows(path):
            where = f"{path}:{line}"
            try:
                if isinstance(row, str):
                    raise DataError(row)
                known = {name.lower(): value for name, value in row.items()}
                if is_missing(known.get(key.lower())):
                    raise DataError(f"no {key}, by which the log names an item; name another column by --columns key=")
                item = make_item(with_year(row) if item_format.is_film else row, item_format)
            except DataError as error:
                errors.append(f"{where}: {error}")
                continue
            rows.append((key_of(known[key.lower()]), item, where))
        if errors and not (drop_bad and rows):
            way_out = "" if drop_bad else " (--drop-unknown leaves them out)"
            raise DataError(f"{path}: {len(errors)} row(s) that are no item{way_out}:", errors)
        for error in errors:
            notes.add("rows of the item table that are no item, left out", error)
        table = cls(item_format, path, key)
        items = [item for _, item, _ in rows]
        if item_format.is_film:
            items = in_natural_order(items, notes)
        for (name, _, where), item in zip(rows, items, strict=True):
            table._add(name, item, where, notes)
        if not table.items:
            raise DataError(f"{path}: no item in this table")
        return table

    def _add(self, name: str, item: Item, where: str, notes: Notes) -> int:
        line = self._line_key(item)
        index = self._of_line.get(line)
        if index is not None:
            notes.add("rows of the item table that come out as one line, taken as one item", f"{where}: {item.line!r}")
        else:
            index = self._of_line[line] = len(self.items)
            self.items.append(item)
        if self._of_key.setdefault(name, index) != index:
            raise DataError(f"{where}: {self.key} {name!r} is another item above; the keys of a table are unique")
        return index

    def _line_key(self, item: Item) -> tuple[str, int | None]:
        """What two rows share that are one item to the catalog: of films, whose spelling does not count, less."""
        return (normalise_title(item.title) if self.format.is_film else item.title), item.year

    def index(self, name: str) -> int | None:
        """The item of a key; without a table every name is an item. DataError when a name cannot be one."""
        index = self._of_key.get(name)
        if index is None and self.path is None:
            if self.format.is_film:
                title, year = parse_name(name)
                if year is None:
                    raise DataError(f"{name!r} has no year; bring an item table (--catalog), or say --item '{{title}}'")
                item = Item(title, year)
            else:
                if len(self.format.columns) > 1:
                    raise DataError(f"{self.format.template!r} needs an item table with these columns: --catalog FILE")
                item = make_item({self.format.columns[0]: parse_title(name)}, self.format)
            index = self._of_line.setdefault(self._line_key(item), len(self.items))
            if index == len(self.items):
                self.items.append(item)
            self._of_key[name] = index
        return index

    def lacks(self, name: str) -> str:
        """What to say of a key that the table does not hold."""
        return (
            f"item {name!r} is not in {self.path} (column {self.key}); add it there, name the right column by "
            "--columns key=NAME, or leave such interactions out by --drop-unknown"
        )

    def entry(self, index: int) -> str:
        """The item as the ground truth of a sample holds it, in JSON."""
        item = self.items[index]
        return json.dumps(item.title if item.year is None else [item.title, item.year], ensure_ascii=False)

    def write(self, path: Path, popularity: Mapping[int, int]) -> None:
        """The catalog with the popularity of every item."""
        items = [replace(item, popularity=popularity.get(index, 0)) for index, item in enumerate(self.items)]
        make_catalog(items, self.format).to_jsonl(path)


class SampleWriter:
    """Samples as lines of JSON; what is the same in many is made once."""

    def __init__(self, table: ItemTable, num_history: int, sentence: str, separator: str) -> None:
        self._table, self._num_history, self._sentence, self._separator = table, num_history, sentence, separator
        self._entry: dict[int, str] = {}
        self._title: dict[int, str] = {}

    def line(self, sample_id: str, dialog: str, history: Sequence[int], wanted: Sequence[int]) -> str:
        """The sample of a user who chose `history`, the latest last, and `wanted` after it."""
        items = self._table.items
        for index in (*history, *wanted):
            if index not in self._entry:
                self._entry[index] = self._table.entry(index)
                self._title[index] = json.dumps(items[index].line, ensure_ascii=False)
        named = self._separator.join(items[index].line for index in history[-self._num_history :])
        text = json.dumps(self._sentence.replace("{items}", named), ensure_ascii=False)
        return (
            f'{{"id": {json.dumps(sample_id)}, "dialog": {json.dumps(dialog)}, "conversation": [{{"role": "user", '
            f'"content": {text}}}], "seen_titles": [{", ".join(self._title[i] for i in dict.fromkeys(history))}], '
            f'"groundtruth": [{", ".join(self._entry[i] for i in wanted)}]}}'
        )
