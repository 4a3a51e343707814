"""Plain tables: one sample a row of a JSONL, JSON, CSV or parquet file, under column names of one's own.

Columns, by our names: `conversation` (see `read_turns`) and `groundtruth` (see `parse_groundtruth`) are needed;
`candidates`, `seen_titles`, `id`, `dialog`, `completion` and `split` are optional. `columns` maps our names to the
file's. Without that, `prompt` and `groundtruth_with_release_year`, the columns of the released data, are taken for the
first two, and a column such as `dialog_id` for the dialog. Other columns of text and numbers become further fields.

Rows of one dialog have one value of `dialog`. Ids that several rows share are such values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rankgrpo.data.candidates import candidate_items
from rankgrpo.data.importers.common import (
    SPLIT_NAMES,
    Imported,
    Notes,
    parse_candidates,
    parse_groundtruth,
    parse_seen,
    split_name,
)
from rankgrpo.data.importers.saved import GROUNDTRUTH, NOTHING_SAID, message_of
from rankgrpo.data.importers.turns import read_turns
from rankgrpo.data.samples import SAMPLE_FIELDS, Sample, check_groundtruth
from rankgrpo.errors import DataError
from rankgrpo.files.rows import is_missing, read_csv, read_json, read_jsonl, read_parquet, type_name
from rankgrpo.items.catalog import Catalog

FIELDS = ("id", "dialog", "conversation", "seen_titles", "groundtruth", "candidates", "completion", "split")
SUFFIXES = (".jsonl", ".csv", ".json", ".parquet")
_OTHER_NAMES = {
    "conversation": ("prompt",),
    "groundtruth": (GROUNDTRUTH,),
    "dialog": ("dialog_id", "dialogue_id", "conversation_id", "conv_id"),
}
"""Columns taken for a field where its own is not there."""
_FURTHER = "further fields"
"""Where a row holds the columns that are no field of ours."""
_READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": lambda path: read_csv(path, columns=()),
}


def find_tables(path: Path) -> dict[str, Path]:
    """Files of samples by split; a lone file is "train" until its rows say otherwise."""
    if path.is_file():
        return {"train": path} if path.suffix.lower() in SUFFIXES else {}
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else []:
        split = split_name(file.stem)
        if split is None or file.suffix.lower() not in SUFFIXES:
            continue
        if split in found:
            raise DataError(f"{path}: both {found[split].name} and {file.name} are {split}; keep the one that counts")
        found[split] = file
    return found


def read_tables(path: Path, *, catalog: Catalog | None = None, columns: Mapping[str, str] | None = None) -> Imported:
    """Samples of one file, or of a folder with a file a split. Raises DataError naming every unusable row."""
    columns = dict(columns or {})
    if unknown := columns.keys() - set(FIELDS):
        raise DataError(f"--columns: {', '.join(sorted(unknown))} is no field; fields are {', '.join(FIELDS)}")
    files = find_tables(path)
    if not files:
        kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise DataError(f"{path}: expected a {kinds} file, or a folder with train, validation, test as such files")
    notes = Notes()
    errors: list[str] = []
    found: list[tuple[str, Sample, str | None, str]] = []
    for split, file in files.items():
        further: dict[str, bool] = {}
        for line, row in tqdm(_rows(file, columns), desc=file.name, unit=" rows", dynamic_ncols=True):
            where = f"{file}:{line}"
            try:
                if isinstance(row, str):
                    raise DataError(row)
                sample = _to_sample(row, f"{file.stem}-{line}", catalog, notes, where)
                own = _own_split(row, split)
                for name in row[_FURTHER]:
                    further[name] = further.get(name, False) or name in dict(sample.fields)
            except DataError as error:
                errors.append(f"{where}: {error}")
                continue
            if sample.conversation:
                found.append((own, sample, str(row["id"]) if "id" in row else None, where))
            else:
                notes.add(NOTHING_SAID, where)
        _note_further(further, file, notes)
    splits: dict[str, list[Sample]] = {}
    for own, sample in _with_ids(found, notes, errors):
        splits.setdefault(own, []).append(sample)
    if errors:
        raise DataError(f"{path}: {len(errors)} unusable row(s):", errors)
    return Imported(f"{', '.join(file.name for file in files.values())} of {path}", splits, notes=notes)


def _with_ids(
    found: list[tuple[str, Sample, str | None, str]], notes: Notes, errors: list[str]
) -> Iterator[tuple[str, Sample]]:
    """(split, sample), each under an id of its own; an id that several rows of a split share is that of their dialog.

    Files of splits are often numbered from 0 each: such an id says nothing of a dialog, and takes the split's name.
    """
    counts = Counter((split, key) for split, _, key, _ in found if key is not None)
    num_splits = Counter(key for _, key in counts)
    shared = any(count > 1 for count in counts.values())
    by_dialog = any(sample.dialog is not None for _, sample, *_ in found)
    number: Counter[tuple[str, str]] = Counter()
    for split, sample, key, where in found:
        if key is None:
            yield split, sample
            continue
        number[split, key] += 1
        if shared and not by_dialog:
            if number[split, key] == 2:
                notes.add("ids that several rows share, taken for those of their dialogs", f"{where}: {key}")
            yield split, replace(sample, id=f"{key}-{number[split, key]}", dialog=key)
            continue
        if number[split, key] > 1:
            errors.append(f"{where}: id {key!r} is there before; with a column of dialogs, ids must be unique")
        if num_splits[key] > 1:
            notes.add("ids that several splits have, the name of the split put before", f"{where}: {key}")
            sample = replace(sample, id=f"{split}-{key}")
        yield split, sample


def _rows(file: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows under our names of their columns; the names of a CSV are compared in lower case."""
    is_csv = file.suffix.lower() == ".csv"
    columns = {name: column.lower() if is_csv else column for name, column in columns.items()}
    free = [name for name in FIELDS if name not in columns]
    taken = set(columns.values())
    names = {name: (column,) for name, column in columns.items()}
    names |= {name: tuple(n for n in (name, *_OTHER_NAMES.get(name, ())) if n not in taken) for name in free}
    for line, row in _READERS[file.suffix.lower()](file):
        if isinstance(row, str):
            yield line, row
            continue
        row = {column: value for column, value in row.items() if not is_missing(value)}
        named: dict[str, Any] = {}
        used = set(SAMPLE_FIELDS)
        for name, theirs in names.items():
            column = next((column for column in theirs if column in row), None)
            if column is not None:
                named[name] = row[column]
                used.add(column)
        missing = [
            f"{columns.get(name, name)} ({name})" for name in ("conversation", "groundtruth") if name not in named
        ]
        if missing:
            there = ", ".join(row)
            log = {"user", "item"} <= {name.lower().removesuffix("_id") for name in row}
            hint = (
                "a log of choices is imported by --format interactions"
                if log
                else "name others by --columns conversation=NAME"
            )
            yield line, f"missing {', '.join(missing)}; there is {there}; {hint}"
        else:
            named[_FURTHER] = {column: value for column, value in row.items() if column and column not in used}
            yield line, named


def _to_sample(row: Mapping[str, Any], sample_id: str, catalog: Catalog | None, notes: Notes, where: str) -> Sample:
    completion = row.get("completion")
    if isinstance(completion, list):
        completion = message_of(completion, "completion", "assistant")
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"completion must be a string or messages, got {type_name(completion)}")
    dialog = row.get("dialog")
    if not isinstance(dialog, str | int | float | None):
        raise DataError(f"dialog must be the id of a dialog, got {type_name(dialog)}")
    groundtruth, weights = parse_groundtruth(row["groundtruth"], catalog, notes, where)
    sample = Sample(
        id=str(row.get("id", sample_id)),
        conversation=read_turns(row["conversation"]),
        seen_titles=parse_seen(row.get("seen_titles", []), catalog, notes, where),
        groundtruth=groundtruth,
        completion=completion,
        dialog=None if dialog is None else str(dialog),
        weights=weights,
        candidates=parse_candidates(row["candidates"], catalog, notes, where) if "candidates" in row else (),
        fields=tuple((name, str(v)) for name, v in row[_FURTHER].items() if type(v) in (str, int, float)),
    )
    check_groundtruth(sample.candidates, sample.groundtruth)
    if catalog is not None:
        candidate_items(sample, catalog)
    return sample


def _note_further(further: Mapping[str, bool], file: Path, notes: Notes) -> None:
    """Note the columns of a file that are no field of ours, by whether they are kept."""
    for is_kept, kind in (
        (True, "columns that are no field, kept for prompts that name them"),
        (False, "columns that are no field and neither text nor numbers, left out"),
    ):
        names = sorted(name for name, kept in further.items() if kept == is_kept)
        notes.add(kind, f"{file}: {', '.join(names)}", len(names))


def _own_split(row: Mapping[str, Any], split: str) -> str:
    if "split" not in row:
        return split
    own = split_name(str(row["split"]))
    if own is None:
        raise DataError(f"split must be one of {', '.join(SPLIT_NAMES)}, got {row['split']!r}")
    return own
