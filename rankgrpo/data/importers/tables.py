"""Plain JSONL and CSV: one sample a row, under column names of one's own.

Columns, by our names: `conversation` (a list of {role, content}, or text with lines `User: ...` and `Assistant: ...`;
text without them is one user turn) and `groundtruth` (see `parse_groundtruth`) are needed; `seen_titles`, `id`,
`completion` and `split` are optional. `columns` maps our names to the file's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rankgrpo.data.conversation import read_conversation
from rankgrpo.data.importers.common import SPLIT_NAMES, Imported, Notes, parse_groundtruth, parse_seen, split_name
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.errors import DataError
from rankgrpo.files.rows import read_csv, read_jsonl, type_name
from rankgrpo.items.catalog import Catalog

FIELDS = ("id", "conversation", "seen_titles", "groundtruth", "completion", "split")
SUFFIXES = (".jsonl", ".csv")
_ROLES = {
    **dict.fromkeys(("user", "human", "seeker", "initiator", "you"), "user"),
    **dict.fromkeys(("assistant", "system", "bot", "gpt", "recommender", "respondent"), "assistant"),
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
    theirs = {name: name for name in FIELDS} | dict(columns or {})
    if unknown := theirs.keys() - set(FIELDS):
        raise DataError(f"--columns: {', '.join(sorted(unknown))} is no field; fields are {', '.join(FIELDS)}")
    files = find_tables(path)
    if not files:
        raise DataError(
            f"{path}: expected a .jsonl or .csv file, or a folder with train, validation, test as such files"
        )
    notes = Notes()
    errors: list[str] = []
    splits: dict[str, list[Sample]] = {}
    known: set[str] = set()
    for split, file in files.items():
        for line, row in tqdm(_rows(file, theirs), desc=file.name, unit=" rows", dynamic_ncols=True):
            where = f"{file}:{line}"
            try:
                if isinstance(row, str):
                    raise DataError(row)
                sample = _to_sample(row, f"{file.stem}-{line}", catalog, notes, where)
                if sample.id in known:
                    raise DataError(f"id {sample.id!r} is there before; ids must be unique")
                own = _own_split(row, split)
            except DataError as error:
                errors.append(f"{where}: {error}")
                continue
            known.add(sample.id)
            splits.setdefault(own, []).append(sample)
    if errors:
        raise DataError(f"{path}: {len(errors)} unusable row(s):", errors)
    return Imported(f"{', '.join(file.name for file in files.values())} of {path}", splits, notes=notes)


def _rows(file: Path, theirs: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows under our names of their columns; the names of a CSV are compared in lower case."""
    if file.suffix.lower() == ".csv":
        theirs = {name: column.lower() for name, column in theirs.items()}
        rows = read_csv(file, columns=[theirs["conversation"], theirs["groundtruth"]])
    else:
        rows = read_jsonl(file)
    for line, row in rows:
        if isinstance(row, str):
            yield line, row
            continue
        named = {name: row[column] for name, column in theirs.items() if row.get(column) is not None}
        missing = [f"{theirs[name]} ({name})" for name in ("conversation", "groundtruth") if name not in named]
        if missing:
            there = ", ".join(row)
            yield line, f"missing {', '.join(missing)}; there is {there}; name others by --columns conversation=NAME"
        else:
            yield line, named


def _to_sample(row: Mapping[str, Any], sample_id: str, catalog: Catalog | None, notes: Notes, where: str) -> Sample:
    completion = row.get("completion")
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"completion must be a string, got {type_name(completion)}")
    return Sample(
        id=str(row.get("id", sample_id)),
        conversation=_conversation(row["conversation"]),
        seen_titles=parse_seen(row.get("seen_titles", []), notes, where),
        groundtruth=parse_groundtruth(row["groundtruth"], catalog, notes, where),
        completion=completion,
    )


def _conversation(value: object) -> tuple[Turn, ...]:
    if isinstance(value, str):
        return read_conversation(value)
    if not isinstance(value, list) or not value:
        raise DataError(f"conversation must be a list of turns or a text, got {value!r:.80}")
    turns = []
    for place, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise DataError(f"conversation[{place}] must be an object with role and content, got {turn!r:.80}")
        role = _ROLES.get(str(turn.get("role")).lower())
        if role is None:
            raise DataError(f"conversation[{place}].role must be one of {', '.join(_ROLES)}, got {turn.get('role')!r}")
        turns.append(Turn(role, turn["content"]))
    return tuple(turns)


def _own_split(row: Mapping[str, Any], split: str) -> str:
    if "split" not in row:
        return split
    own = split_name(str(row["split"]))
    if own is None:
        raise DataError(f"split must be one of {', '.join(SPLIT_NAMES)}, got {row['split']!r}")
    return own
