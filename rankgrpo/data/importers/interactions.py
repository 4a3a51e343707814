"""Logs of what users chose -> samples: the conversation names the last items of a user, right are the next ones.

Two forms are read. A log has a row an interaction (user, item, time, rating); the whole program decides what is trained
on and what is tested. A table of histories has a row a sample: a list-valued column with what was chosen before, and
the item that was chosen next. Both refer to an item table by a key, or name the items themselves.

No split learns from another: a user's training samples end before the first item that is right in validation or test,
and an item's popularity counts training interactions alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rankgrpo.data.importers.common import Notes, split_name
from rankgrpo.data.importers.item_table import ItemTable, SampleWriter
from rankgrpo.data.importers.logs import SUFFIXES, Log, a_list, column_names, filled, key_of, read_log, rows_of
from rankgrpo.data.samples import SPLITS
from rankgrpo.errors import DataError
from rankgrpo.files.atomic import atomic_folder, write_lines
from rankgrpo.files.rows import is_missing, parse_list_text
from rankgrpo.items.format import FILM, ItemFormat

# Shape letters: R rows of a log.

FIELDS = {
    "user": ("user", "user_id", "userid"),
    "item": ("item", "item_id", "itemid"),
    "time": ("time", "timestamp", "date"),
    "rating": ("rating",),
    "history": ("history",),
    "key": ("id", "item", "item_id", "itemid"),
}
"""Our fields and the column names that are taken for them unasked; `key` is the item table's."""
SENTENCE = "I chose {items}. What next?"


@dataclass(frozen=True)
class InteractionOptions:
    """How a log becomes samples."""

    item: ItemFormat = FILM
    catalog: Path | None = None
    """The item table; without it an item is what the log says."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our field -> their column; "none" for a field that is not to be used."""
    num_history: int = 10
    """Items that the conversation names, the latest last."""
    num_next: int = 1
    """Items that are right: the next ones."""
    num_cuts: int = 5
    """Training samples of a user, the latest."""
    split: Literal["last", "time"] = "last"
    """`last`: of every user the last items are the test, those before them validation. `time`: what was chosen after a
    moment is the test, whoever chose it."""
    validation_frac: float = 0.1
    test_frac: float = 0.1
    core: int = 0
    """Users and items with fewer interactions are left out, again and again until none is left."""
    min_rating: float | None = None
    drop_unknown: bool = False
    """Leave out what the item table lacks, instead of refusing the log."""
    sentence: str = SENTENCE
    separator: str = "; "
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_history", 1), ("num_next", 1), ("num_cuts", 1), ("core", 0)):
            if getattr(self, name) < least:
                raise DataError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("validation_frac", "test_frac"):
            if not 0 < getattr(self, name) < 0.5:
                raise DataError(f"{name} must be between 0 and 0.5, got {getattr(self, name)}")
        if "{items}" not in self.sentence:
            raise DataError(f"the sentence {self.sentence!r} must say where the items go: {{items}}")
        if unknown := self.columns.keys() - FIELDS.keys():
            raise DataError(f"--columns: {', '.join(sorted(unknown))} is no field; fields are {', '.join(FIELDS)}")


def import_interactions(source: Path, out: Path, options: InteractionOptions) -> str:
    """Write the data set folder `out`, whole or not at all; returns what was done, in words."""
    if out.exists():
        raise DataError(f"{out} exists; remove it, or name another folder")
    files = _files(source)
    notes = Notes()
    table = _table(options, notes)
    first = next(iter(files.values()))
    is_log = _column(options, "history", first) is None
    if is_log and len(files) > 1:
        raise DataError(f"{source}: a log is one file, which is split by --split; got {', '.join(files)}")
    popularity: dict[int, int] = {}
    make = _log_samples if is_log else _history_samples
    if is_log and "train" not in files:
        files = {"train": first}
    with atomic_folder(out) as folder:
        counts = {}
        writers = make(files, options, table, popularity, notes)
        for split in SPLITS:
            lines = list(writers[split])
            if not lines:
                why = "; ".join(str(notes).splitlines()) or "no user has enough interactions"
                raise DataError(f"{source}: no {split} sample ({why})")
            write_lines(folder / f"{split}.jsonl", lines)
            counts[split] = len(lines)
        table.write(folder / "catalog.jsonl", popularity)
    parts = ", ".join(f"{count} {split}" for split, count in counts.items())
    done = f"imported {source} into {out}: {parts} samples over {len(table.items)} items"
    return "\n".join(line for line in (done, str(notes)) if line)


# ----------------------------------------------------------------------------------------------------------------------
# Rows of samples


Lines = Mapping[str, Iterator[str]]


def _log_samples(
    files: Mapping[str, Path], options: InteractionOptions, table: ItemTable, popularity: dict[int, int], notes: Notes
) -> Lines:
    """Lines of every split, from a log."""
    (path,) = files.values()
    user, item = (_need(options, name, path) for name in ("user", "item"))
    time = _column(options, "time", path)
    rating = _column(options, "rating", path) if options.min_rating is not None else None
    if options.min_rating is not None and rating is None:
        raise DataError(f"{path}: --min-rating needs a column of ratings; name it by --columns rating=NAME")
    log = read_log(path, user, item, time, rating)
    if time is None:
        if options.split == "time":
            raise DataError(f"{path}: --split time needs a column of times; name it by --columns time=NAME")
        notes.add("logs without times, the order of their rows being the order", str(path))
    kept = _kept(log, options, table, notes)
    user_R, item_R, time_R = kept
    # Both ends of every user's rows; a log of which nothing is left has none.
    borders = np.flatnonzero(np.diff(user_R, prepend=-1, append=-1))
    starts, ends = borders[:-1], borders[1:]
    moments = None
    if options.split == "time":
        assert time_R is not None
        fractions = [1 - options.validation_frac - options.test_frac, 1 - options.test_frac]
        moments = tuple(np.quantile(time_R, fractions, method="inverted_cdf")) if len(time_R) else (0.0, 0.0)
    writer = SampleWriter(table, options.num_history, options.sentence, options.separator)
    lines: dict[str, list[str]] = {name: [] for name in SPLITS}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        items, name, m = item_R[start:end].tolist(), log.users[user_R[start]], options.num_next
        if moments is not None and time_R is not None:
            first, second = np.searchsorted(time_R[start:end], moments, side="left").tolist()
        else:
            first, second = _last_borders(len(items), m)
        for index in items[:first]:
            popularity[index] = popularity.get(index, 0) + 1
        last = max(first - m, 1)
        for cut in range(max(1, last - options.num_cuts + 1), min(last + 1, first)):
            wanted = items[cut : min(cut + m, first)]
            lines["train"].append(writer.line(f"{name}-{cut}", name, items[:cut], wanted))
        for split, begin, stop in (("validation", first, second), ("test", second, len(items))):
            if 0 < begin < stop:
                wanted = items[begin : min(begin + m, stop)]
                lines[split].append(writer.line(f"{name}-{split}", f"{name} {split}", items[:begin], wanted))
    return {name: iter(found) for name, found in lines.items()}


def _last_borders(num_items: int, num_next: int) -> tuple[int, int]:
    """Where the validation and the test of a user begin; one who is too short to teach as well is all training."""
    if num_items < 2 * num_next + 2:
        return num_items, num_items
    return num_items - 2 * num_next, num_items - num_next


def _kept(
    log: Log, options: InteractionOptions, table: ItemTable, notes: Notes
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Users, items and times of what counts, by user and in order of time; the first of an item that a user repeats."""
    index_of, errors = np.full(len(log.items), -1, dtype=np.int64), []
    for code, name in enumerate(log.items):
        try:
            index = table.index(name)
        except DataError as error:
            index = None
            problem = str(error)
        else:
            problem = table.lacks(name)
        if index is not None:
            index_of[code] = index
        elif not options.drop_unknown:
            line = int(log.line_R[np.argmax(log.item_R == code)])
            errors.append(f"{log.path}:{line}: {problem}")
            if len(errors) == 100:
                break
    if errors:
        more = "at least " if len(errors) == 100 else ""
        raise DataError(f"{log.path}: {more}{len(errors)} item(s) that are not known:", errors)
    item_R = index_of[log.item_R]
    keep_R = item_R >= 0
    notes.add(f"interactions with items that {table.path} lacks, left out", _first(log, ~keep_R), int((~keep_R).sum()))
    if log.rating_R is not None:
        assert options.min_rating is not None
        low_R = keep_R & (log.rating_R < options.min_rating)
        keep_R &= ~low_R
        notes.add(f"ratings below {options.min_rating:g}, left out", _first(log, low_R), int(low_R.sum()))
    rows = np.flatnonzero(keep_R)
    order = np.lexsort((log.time_R[rows], log.user_R[rows]) if log.time_R is not None else (log.user_R[rows],))
    rows = rows[order]  # lexsort is stable: equal times stay in the order of the file
    pairs = log.user_R[rows] * np.int64(len(table.items) + 1) + item_R[rows]
    first = np.zeros(len(rows), dtype=bool)
    first[np.unique(pairs, return_index=True)[1]] = True
    again = np.zeros(len(item_R), dtype=bool)
    again[rows[~first]] = True
    notes.add("interactions of a user with an item again, left out", _first(log, again), int(again.sum()))
    rows = rows[first]
    num_rows = len(rows)
    while options.core > 1:
        user_counts = np.bincount(log.user_R[rows], minlength=len(log.users))
        item_counts = np.bincount(item_R[rows], minlength=len(table.items))
        enough = (user_counts[log.user_R[rows]] >= options.core) & (item_counts[item_R[rows]] >= options.core)
        if enough.all():
            break
        rows = rows[enough]
    kind = f"interactions of users and items with fewer than {options.core}, left out"
    notes.add(kind, f"{len(rows)} of {num_rows} are left", num_rows - len(rows))
    return log.user_R[rows], item_R[rows], None if log.time_R is None else log.time_R[rows]


def _first(log: Log, marked_R: np.ndarray) -> str:
    return f"{log.path}:{log.line_R[np.argmax(marked_R)]}"


def _history_samples(
    files: Mapping[str, Path], options: InteractionOptions, table: ItemTable, popularity: dict[int, int], notes: Notes
) -> Lines:
    """Lines of every split, from rows with a history; a missing validation or test is drawn from the training users."""
    rows: dict[str, list[tuple[str, list[int], list[int]]]] = {}
    errors: list[str] = []
    for split, path in files.items():
        history, item = (_need(options, name, path) for name in ("history", "item"))
        user = _column(options, "user", path)
        kept = rows.setdefault(split, [])
        for line, (before, after, *who) in rows_of(path, [history, item, *([] if user is None else [user])]):
            where = f"{path}:{line}"
            try:
                name = f"{path.stem}-{line}" if user is None else filled(who[0], user)
                past = _known(a_list([] if is_missing(before) else before, history), table, options, notes, where)
                listed = parse_list_text(after, item) if isinstance(after, str) else after
                following = a_list(listed if isinstance(listed, list) else [filled(after, item)], item)
                wanted = _known(following, table, options, notes, where)[: options.num_next]
            except DataError as error:
                errors.append(f"{where}: {error}")
                continue
            named = [index for index in wanted if index not in past]
            if not past or not named:
                kind = "without a history" if not past else "whose next item is in the history already"
                notes.add(f"rows {kind}, left out", where)
                continue
            kept.append((name, past, named))
    if errors:
        raise DataError(f"{len(errors)} unusable row(s):", errors)
    if not rows.get("train"):
        raise DataError(f"{', '.join(map(str, files.values()))}: no training row with a history and a next item")
    _draw_users(rows, files, options, notes)
    for _, _, named in rows["train"]:
        for index in named:
            popularity[index] = popularity.get(index, 0) + 1
    writer = SampleWriter(table, options.num_history, options.sentence, options.separator)

    def lines(split: str) -> Iterator[str]:
        for place, (name, past, named) in enumerate(rows.get(split, [])):
            yield writer.line(f"{split}-{place}", name if split == "train" else f"{name} {split}", past, named)

    return {split: lines(split) for split in SPLITS}


def _draw_users(
    rows: dict[str, list[Any]], files: Mapping[str, Path], options: InteractionOptions, notes: Notes
) -> None:
    """Whole users for the splits that the source lacks: the next history of a user holds what was right before."""
    path = files["train"]
    is_named = "user" in options.columns or _column(options, "user", path) is not None
    for place, (split, frac) in enumerate((("validation", options.validation_frac), ("test", options.test_frac))):
        if rows.get(split):
            continue
        if not is_named:
            raise DataError(
                f"{path}: no {split} rows, and no column of the user, whose rows belong in one split: the next history "
                f"of a user holds what was right before. There is {', '.join(column_names(path))}; say --columns "
                "user=NAME, or user=none where every row is another user's"
            )
        users = list(dict.fromkeys(name for name, _, _ in rows.get("train", [])))
        if len(users) < 2:
            raise DataError(f"no {split} rows, and {len(users)} training user(s): none can be drawn from them")
        order = np.random.default_rng([options.seed, place]).permutation(len(users))
        drawn = {users[index] for index in order[: max(1, round(frac * len(users)))]}
        rows[split] = [row for row in rows["train"] if row[0] in drawn]
        rows["train"] = [row for row in rows["train"] if row[0] not in drawn]
        notes.add("splits missing in the source, users drawn from train", f"{split}: {len(rows[split])} samples")


def _known(names: Sequence[Any], table: ItemTable, options: InteractionOptions, notes: Notes, where: str) -> list[int]:
    found = []
    for name in names:
        index = table.index(key_of(name))
        if index is not None:
            found.append(index)
        elif options.drop_unknown:
            notes.add(f"items of histories that {table.path} lacks, left out", f"{where}: {name!r}")
        else:
            raise DataError(table.lacks(key_of(name)))
    return list(dict.fromkeys(found))


# ----------------------------------------------------------------------------------------------------------------------
# Files and columns


def _table(options: InteractionOptions, notes: Notes) -> ItemTable:
    if options.catalog is None:
        return ItemTable(options.item)
    # Without an id of its own an item goes by the first column that its line is made of.
    key = _column(options, "key", options.catalog) or options.item.columns[0]
    return ItemTable.read(options.catalog, options.item, key, notes, drop_bad=options.drop_unknown)


def _files(source: Path) -> dict[str, Path]:
    """One table, or the tables of a folder by split."""
    if source.is_file():
        return {"train": source}
    found: dict[str, Path] = {}
    for file in sorted(source.iterdir()) if source.is_dir() else []:
        split = split_name(file.stem)
        if split is not None and file.suffix.lower() in SUFFIXES:
            if split in found:
                raise DataError(f"{source}: both {found[split].name} and {file.name} are {split}; keep one")
            found[split] = file
    if not found:
        raise DataError(f"{source}: expected a table ({', '.join(SUFFIXES)}), or a folder with train, validation, test")
    return found


def _column(options: InteractionOptions, field_name: str, path: Path) -> str | None:
    """The column that is a field: the one named by --columns, or one with a usual name; None where there is none."""
    if field_name in options.columns:
        column = options.columns[field_name]
        return None if column.lower() == "none" else column
    there = {name.lower(): name for name in column_names(path)}
    return next((there[name] for name in FIELDS[field_name] if name in there), None)


def _need(options: InteractionOptions, field_name: str, path: Path) -> str:
    column = _column(options, field_name, path)
    if column is None:
        there = ", ".join(column_names(path))
        raise DataError(f"{path}: no column of the {field_name}; there is {there}; say --columns {field_name}=NAME")
    return column
