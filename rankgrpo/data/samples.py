"""Samples and their files, and the order in which a run goes through them.

Files are JSONL, one sample a line; a data set is a folder of `train.jsonl`, `validation.jsonl`, `test.jsonl` and
`catalog.jsonl` (or `.csv`). What makes a file unusable (broken JSON, a missing field, a duplicate id) is raised as one
DataError naming every bad line; what merely looks wrong (an unknown title, an empty ground truth) is collected in
`Dataset.problems`. Nothing here samples, batches tensors or touches a device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankgrpo.errors import DataError
from rankgrpo.files.atomic import write_lines
from rankgrpo.files.rows import Problem, read_jsonl, type_name
from rankgrpo.items.catalog import Catalog, parse_title, parse_year
from rankgrpo.items.format import FILM, ItemFormat, title_line

SPLITS = ("train", "validation", "test")
ROLES = ("user", "assistant")


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance. Example: Turn("user", "Something like Heat (1995)?")"""

    role: str
    """ "user" or "assistant"."""
    content: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation up to a recommendation, and what would have been right to recommend.

    Example: Sample("redial-391-3", (Turn("user", "I like Heat (1995)"),), ("Heat",), (("Ronin", 1998),))
    """

    id: str
    conversation: tuple[Turn, ...]
    seen_titles: tuple[str, ...]
    """Titles already mentioned, which a list should not repeat; with or without their year."""
    groundtruth: tuple[tuple[str, int | None], ...]
    """(title, year) of the items that count as hits; (line, None) under a format without years."""
    completion: str | None = None
    """SFT demonstration: lines of items joined by a newline, no trailing newline."""
    dialog: str | None = None
    """What all samples cut from one dialog share, or all of one user; None where `dialog_ids` has to find out."""


@dataclass(frozen=True)
class Dataset:
    """Three splits, the catalog they share, and what looked wrong while reading them."""

    name: str
    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    catalog: Catalog
    problems: list[Problem] = field(default_factory=list)
    """What looked wrong in the files and did not stop their reading."""
    num_dropped: dict[str, int] = field(default_factory=dict)
    """Samples by split that were left out because their ground truth is empty."""

    def split(self, name: str) -> list[Sample]:
        """The samples of "train", "validation" or "test"; ValueError for another name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        if name not in splits:
            raise ValueError(f"split must be one of {list(SPLITS)}, got {name!r}")
        return splits[name]


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing


def read_samples(
    path: str | os.PathLike[str], *, catalog: Catalog | None = None, item_format: ItemFormat = FILM
) -> tuple[list[Sample], list[Problem]]:
    """Read a JSONL file of samples; return them with the soft problems.

    Fields: `id` (string), `conversation` (list of {role, content}, role "user" or "assistant"), `seen_titles` (list of
    strings), `groundtruth` (a list of films as [title, year], of other items as their lines) and optionally
    `completion` (string). `groundtruth_turn` and `split` are known and not used. With a catalog, whose format then
    counts, titles it does not hold are soft problems; so are an empty ground truth (the sample is returned all the
    same), an item listed twice in a ground truth (kept once), a `split` that is not the file's, and an unknown field
    (once a name).

    Raises DataError listing every line with broken JSON, a missing or wrongly typed field, a bad role, an empty
    conversation or an id seen before.
    """
    samples, errors, problems = scan_samples(Path(path), catalog, item_format)
    if errors:
        raise DataError(f"{path}: {len(errors)} bad line(s):", errors)
    return samples, problems


def write_samples(path: str | os.PathLike[str], samples: Sequence[Sample]) -> None:
    """Write samples as JSONL, complete or not at all (temporary file, then rename)."""
    write_lines(path, (json.dumps(_to_row(sample), ensure_ascii=False) for sample in samples))


_FIELDS = {"id", "conversation", "seen_titles", "groundtruth", "completion", "dialog", "groundtruth_turn", "split"}


def scan_samples(
    path: Path, catalog: Catalog | None, item_format: ItemFormat = FILM
) -> tuple[list[Sample], list[str], list[Problem]]:
    """(samples, errors, soft problems) of a file; see `read_samples`."""
    item_format = item_format if catalog is None else catalog.item_format
    if not path.is_file():
        raise DataError(f"{path}: no such file; samples are JSONL, one conversation a line")
    samples: list[Sample] = []
    errors: list[str] = []
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    unknown: set[str] = set()
    for line, row in read_jsonl(path):
        where = f"{path}:{line}"
        try:
            if isinstance(row, str):
                raise DataError(row)
            sample = _to_sample(row, item_format)
            if sample.id in first_line:
                raise DataError(f"id {sample.id!r} is already on line {first_line[sample.id]}; ids must be unique")
        except DataError as error:
            errors.append(f"{where}: {error}")
            continue
        first_line[sample.id] = line
        for name in sorted(_names(row) - unknown):
            unknown.add(name)
            problems.append(Problem("unknown fields", where, f"unknown field {name!r} is not used (reported once)"))
        for kind, text in _soft_problems(row, sample, path.stem, catalog):
            problems.append(Problem(kind, where, f"{sample.id}: {text}"))
        samples.append(sample)
    return samples, errors, problems


def _names(row: Mapping[str, Any]) -> set[str]:
    """Unknown field names of a row and of its turns."""
    in_turns = {f"conversation.{name}" for turn in row["conversation"] for name in turn.keys() - {"role", "content"}}
    return (row.keys() - _FIELDS) | in_turns


def _to_sample(row: Mapping[str, Any], item_format: ItemFormat) -> Sample:
    if missing := {"id", "conversation", "seen_titles", "groundtruth"} - row.keys():
        raise DataError(f"missing {', '.join(sorted(missing))}")
    completion = row.get("completion")
    if not isinstance(row["id"], str) or not row["id"]:
        raise DataError(f"id must be a non-empty string, got {row['id']!r}")
    for name in ("completion", "dialog"):
        if row.get(name) is not None and not isinstance(row[name], str):
            raise DataError(f"{name} must be a string, got {type_name(row[name])}")
    turns = _a_list(row["conversation"], "conversation")
    if not turns:
        raise DataError("conversation is empty; there is nothing to recommend for")
    seen_titles = _a_list(row["seen_titles"], "seen_titles")
    groundtruth = _a_list(row["groundtruth"], "groundtruth")
    return Sample(
        id=row["id"],
        conversation=tuple(_to_turn(turn, place) for place, turn in enumerate(turns)),
        seen_titles=tuple(_in_field(f"seen_titles[{place}]", parse_title, t) for place, t in enumerate(seen_titles)),
        # dict.fromkeys: the same item twice is one thing to find; `_soft_problems` reports it.
        groundtruth=tuple(dict.fromkeys(_to_entry(e, place, item_format) for place, e in enumerate(groundtruth))),
        completion=completion,
        dialog=row.get("dialog"),
    )


def _to_turn(turn: object, place: int) -> Turn:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise DataError(f"conversation[{place}] must be an object with role and content, got {type_name(turn)}")
    if turn["role"] not in ROLES:
        raise DataError(f"conversation[{place}].role must be one of {list(ROLES)}, got {turn['role']!r}")
    if not isinstance(turn["content"], str):
        raise DataError(f"conversation[{place}].content must be a string, got {type_name(turn['content'])}")
    return Turn(turn["role"], turn["content"])


def _to_entry(entry: object, place: int, item_format: ItemFormat) -> tuple[str, int | None]:
    """[title, year] of a film, the line of any other item; of either an object with the columns that the format names.

    The item of a format without years is (line, None).
    """
    name = f"groundtruth[{place}]"
    if isinstance(entry, dict):
        if not item_format.is_film:
            return _in_field(name, lambda row: (item_format.write(row), None), entry)
        entry = [entry.get("title"), entry.get("year")]
    if item_format.is_film:
        if not isinstance(entry, list) or len(entry) != 2:
            raise DataError(f"{name} must be [title, year], got {entry!r}")
        return _in_field(name, parse_title, entry[0]), _in_field(name, parse_year, entry[1])
    if not isinstance(entry, str):
        form = f"the line of an item, {item_format.template!r}, or an object with {', '.join(item_format.columns)}"
        raise DataError(f"{name} must be {form}, got {entry!r:.80}")
    return _in_field(name, parse_title, entry), None


def _in_field(name: str, parse: Any, value: object) -> Any:
    """parse(value), with the field's name before the message when it fails."""
    try:
        return parse(value)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _a_list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} must be a list, got {type_name(value)}")
    return value


def _soft_problems(
    row: Mapping[str, Any], sample: Sample, split: str, catalog: Catalog | None
) -> Iterator[tuple[str, str]]:
    """(kind, text) of what looks wrong with a sample."""
    if not sample.groundtruth:
        yield "empty ground truth", "ground truth is empty; the sample is left out of training and evaluation"
    if len(sample.groundtruth) < len(row["groundtruth"]):
        yield "repeated ground truth", "ground truth names an item twice; kept once"
    if split in SPLITS and row.get("split", split) != split:
        yield "samples of another split", f"split says {row['split']!r}, the file is {split}.jsonl"
    if catalog is None:
        return
    for title, year in sample.groundtruth:
        if (title, year) not in catalog:
            yield (
                "ground truth not in the catalog",
                f"ground truth {title_line(title, year)} is not in the catalog and can never be a hit",
            )
    for title in sample.seen_titles:
        if not catalog.title_indices(title):
            yield "seen titles not in the catalog", f"seen title {title!r} is not in the catalog"


def _to_row(sample: Sample) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": sample.id,
        "conversation": [{"role": turn.role, "content": turn.content} for turn in sample.conversation],
        "seen_titles": list(sample.seen_titles),
        "groundtruth": [title if year is None else [title, year] for title, year in sample.groundtruth],
    }
    if sample.completion is not None:
        row["completion"] = sample.completion
    if sample.dialog is not None:
        row["dialog"] = sample.dialog
    return row


# ----------------------------------------------------------------------------------------------------------------------
# The order of batches
