"""Samples and their files, and the order in which a run goes through them.

Files are JSONL, one sample a line; a data set is a folder of `train.jsonl`, `validation.jsonl`, `test.jsonl` and
`catalog.jsonl` (or `.csv`). What makes a file unusable (broken JSON, a missing field, a duplicate id) is raised as one
DataError naming every bad line; what merely looks wrong (an unknown title, an empty ground truth) is collected in
`Dataset.problems`. Nothing here samples, batches tensors or touches a device.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rankgrpo.errors import DataError
from rankgrpo.files.atomic import write_lines
from rankgrpo.files.rows import Problem, read_jsonl, type_name
from rankgrpo.items.catalog import Catalog, normalise_title, parse_title, parse_year
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
class Candidate:
    """An item that a sample may list, and what its prompt tells of it. Example: Candidate("[7]", None, "Ships.")"""

    title: str
    """As in `Item`: the whole line under a format without years."""
    year: int | None = None
    text: str = ""

    def __str__(self) -> str:
        """As prompts show it."""
        return f"{title_line(self.title, self.year)} {self.text}".rstrip()


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
    weights: tuple[float, ...] = ()
    """How relevant each entry of the ground truth is, above 0; empty: 1 each."""
    gain: Literal["linear", "exp2"] = "linear"
    """What a weight w is worth: w, or 2^w - 1."""
    candidates: tuple[Candidate, ...] = ()
    """The items that this sample's lists are orders of; empty: those of the catalog."""
    fields: tuple[tuple[str, str], ...] = ()
    """Further fields of the row, for prompts that name them."""

    @property
    def gains(self) -> tuple[float, ...]:
        """What each entry of the ground truth earns where it is found."""
        if self.gain == "linear":
            return self.weights or (1.0,) * len(self.groundtruth)
        return tuple(2.0**weight - 1 for weight in self.weights) or (1.0,) * len(self.groundtruth)


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


SAMPLE_FIELDS = frozenset(
    "id conversation seen_titles groundtruth completion dialog groundtruth_turn split candidates".split()
)
"""What a row of a sample file may hold; everything else is a further field."""


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
        for kind, text in _soft_problems(row, sample, path.stem, catalog, item_format):
            problems.append(Problem(kind, where, f"{sample.id}: {text}"))
        samples.append(sample)
    return samples, errors, problems


def _names(row: Mapping[str, Any]) -> set[str]:
    """Unknown field names of a row and of its turns."""
    in_turns = {f"conversation.{name}" for turn in row["conversation"] for name in turn.keys() - {"role", "content"}}
    return (row.keys() - SAMPLE_FIELDS) | in_turns


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
    candidates = _to_candidates(row.get("candidates"), item_format)
    groundtruth, weights = _to_groundtruth(_a_list(row["groundtruth"], "groundtruth"), item_format)
    check_groundtruth(candidates, groundtruth)
    return Sample(
        id=row["id"],
        conversation=tuple(_to_turn(turn, place) for place, turn in enumerate(turns)),
        seen_titles=tuple(_in_field(f"seen_titles[{place}]", parse_title, t) for place, t in enumerate(seen_titles)),
        groundtruth=groundtruth,
        completion=completion,
        dialog=row.get("dialog"),
        weights=weights,
        candidates=candidates,
        fields=tuple((k, str(v)) for k, v in row.items() if k not in SAMPLE_FIELDS and type(v) in (str, int, float)),
    )


def _to_turn(turn: object, place: int) -> Turn:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise DataError(f"conversation[{place}] must be an object with role and content, got {type_name(turn)}")
    if turn["role"] not in ROLES:
        raise DataError(f"conversation[{place}].role must be one of {list(ROLES)}, got {turn['role']!r}")
    if not isinstance(turn["content"], str):
        raise DataError(f"conversation[{place}].content must be a string, got {type_name(turn['content'])}")
    return Turn(turn["role"], turn["content"])


def _to_groundtruth(
    entries: list[Any], item_format: ItemFormat
) -> tuple[tuple[tuple[str, int | None], ...], tuple[float, ...]]:
    """The items to find, each once, and their weights; none where all weigh 1. What weighs 0 is no item to find."""
    weighted = []
    for place, entry in enumerate(entries):
        name = f"groundtruth[{place}]"
        item, weight = split_weight(entry, name, item_format)
        weighted.append((_to_item(item, name, item_format), weight))
    return join_weights(weighted)


def join_weights(
    weighted: Iterable[tuple[tuple[str, int | None], float]],
) -> tuple[tuple[tuple[str, int | None], ...], tuple[float, ...]]:
    """The ground truth and the weights of a sample, as `_to_groundtruth` says, from its entries and what each weighs.

    Raises DataError for an item that has two weights.
    """
    weight_of: dict[tuple[str, int | None], float] = {}
    for place, (item, weight) in enumerate(weighted):
        if weight_of.setdefault(item, weight) != weight:
            known = f"{title_line(*item)} weighs {weight_of[item]:g} before and {weight:g} here"
            raise DataError(f"groundtruth[{place}]: {known}; keep one")
    weight_of = {item: weight for item, weight in weight_of.items() if weight > 0}
    weights = tuple(weight_of.values())
    return tuple(weight_of), () if all(weight == 1 for weight in weights) else weights


def split_weight(entry: Any, name: str, item_format: ItemFormat) -> tuple[Any, float]:
    """An entry without its weight, and the weight: [title, year, weight], ["line", weight], {..., "weight": weight}."""
    weight: Any = 1.0
    if isinstance(entry, dict) and "weight" in entry:
        weight = entry["weight"]
        entry = {key: value for key, value in entry.items() if key != "weight"}
    elif isinstance(entry, list) and len(entry) == 3 - (not item_format.is_film) and type(entry[-1]) in (int, float):
        *rest, weight = entry
        entry = rest if item_format.is_film else rest[0]
    if type(weight) not in (int, float) or not 0 <= weight < math.inf:
        raise DataError(f"{name}: the weight must be a number of 0 or more, got {weight!r}")
    return entry, float(weight)


def _to_item(entry: object, name: str, item_format: ItemFormat) -> tuple[str, int | None]:
    """[title, year] of a film, the line of any other item; of either an object with that as `item`, or with the columns
    that the format names.

    The item of a format without years is (line, None).
    """
    if isinstance(entry, dict) and "item" in entry and "item" not in item_format.columns:
        entry = entry["item"]
    elif isinstance(entry, dict):
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


def _to_candidates(value: object, item_format: ItemFormat) -> tuple[Candidate, ...]:
    """Items as in a ground truth, or objects that have a `text` beside the columns of the format."""
    if value is None:
        return ()
    entries = enumerate(_a_list(value, "candidates"))
    return join_candidates((_to_item(entry, f"candidates[{place}]", item_format), entry) for place, entry in entries)


def join_candidates(entries: Iterable[tuple[tuple[str, int | None], object]]) -> tuple[Candidate, ...]:
    """Candidates from items and the entries that they were read from, which may hold a `text`.

    Raises DataError for an item that is there twice, and for none at all.
    """
    candidates: dict[tuple[str, int | None], Candidate] = {}
    for place, (item, entry) in enumerate(entries):
        name = f"candidates[{place}]"
        text = entry.get("text", "") if isinstance(entry, dict) else ""
        if not isinstance(text, str):
            raise DataError(f"{name}: text must be a string, got {type_name(text)}")
        if item in candidates:
            raise DataError(f"{name}: {title_line(*item)} is a candidate already; keep one")
        candidates[item] = Candidate(*item, " ".join(text.split()))
    if not candidates:
        raise DataError("candidates is empty; leave it out where a list may name any item of the catalog")
    return tuple(candidates.values())


def check_groundtruth(candidates: Sequence[Candidate], groundtruth: Sequence[tuple[str, int | None]]) -> None:
    """Raise DataError for a ground truth that is not among the candidates, where there are any."""
    known = {(normalise_title(candidate.title), candidate.year) for candidate in candidates}
    missing = [item for item in groundtruth if (normalise_title(item[0]), item[1]) not in known]
    if candidates and missing:
        raise DataError(
            f"the ground truth {title_line(*missing[0])} is not among the {len(candidates)} candidates and can never "
            "be a hit; add it to candidates, or take it out of groundtruth"
        )


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
    row: Mapping[str, Any], sample: Sample, split: str, catalog: Catalog | None, item_format: ItemFormat
) -> Iterator[tuple[str, str]]:
    """(kind, text) of what looks wrong with a sample."""
    if not sample.groundtruth:
        yield "empty ground truth", "ground truth is empty; the sample is left out of training and evaluation"
    weights = [split_weight(entry, "", item_format)[1] for entry in row["groundtruth"]]
    if len(sample.groundtruth) < sum(weight > 0 for weight in weights):
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
    if sample.weights:
        pairs = zip(sample.groundtruth, sample.weights, strict=True)
        row["groundtruth"] = [[t, weight] if year is None else [t, year, weight] for (t, year), weight in pairs]
    if sample.candidates:
        row["candidates"] = [_candidate_row(candidate) for candidate in sample.candidates]
    if sample.completion is not None:
        row["completion"] = sample.completion
    if sample.dialog is not None:
        row["dialog"] = sample.dialog
    return row | dict(sample.fields)


def _candidate_row(candidate: Candidate) -> Any:
    item = candidate.title if candidate.year is None else [candidate.title, candidate.year]
    return {"item": item, "text": candidate.text} if candidate.text else item


# ----------------------------------------------------------------------------------------------------------------------
# The order of batches
