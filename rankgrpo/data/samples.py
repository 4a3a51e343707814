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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rankgrpo.files.atomic import write_lines
from rankgrpo.items.catalog import (
    Catalog,
    DataError,
    parse_title,
    parse_year,
    read_catalog,
    read_jsonl,
    type_name,
)

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
    groundtruth: tuple[tuple[str, int], ...]
    """(title, year) of the items that count as hits."""
    completion: str | None = None
    """SFT demonstration: `Title (Year)` lines joined by a newline, no trailing newline."""


@dataclass(frozen=True)
class Dataset:
    """Three splits, the catalog they share, and what looked wrong while reading them."""

    name: str
    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    catalog: Catalog
    problems: list[str] = field(default_factory=list)
    """`file:line: message`, none of which stopped the reading."""
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


def read_samples(path: str | os.PathLike[str], *, catalog: Catalog | None = None) -> tuple[list[Sample], list[str]]:
    """Read a JSONL file of samples; return them with the soft problems as `file:line: message`.

    Fields: `id` (string), `conversation` (list of {role, content}, role "user" or "assistant"), `seen_titles` (list of
    strings), `groundtruth` (list of [title, year], the year a number or a string) and optionally `completion` (string).
    `groundtruth_turn` and `split` are known and not used. With a catalog, titles it does not hold are soft problems;
    so are an empty ground truth (the sample is returned all the same), an item listed twice in a ground truth (kept
    once), a `split` that is not the file's, and an unknown field (once a name).

    Raises DataError listing every line with broken JSON, a missing or wrongly typed field, a bad role, an empty
    conversation or an id seen before.
    """
    samples, errors, problems = _scan_samples(Path(path), catalog)
    if errors:
        raise DataError(f"{path}: {len(errors)} bad line(s):", errors)
    return samples, problems


def write_samples(path: str | os.PathLike[str], samples: Sequence[Sample]) -> None:
    """Write samples as JSONL, complete or not at all (temporary file, then rename)."""
    write_lines(path, (json.dumps(_to_row(sample), ensure_ascii=False) for sample in samples))


def load_dataset(source: str | os.PathLike[str], *, num_train: int | None = None, seed: int = 0) -> Dataset:
    """Load a folder, or make the built-in demo when `source` is "demo" (write "./demo" for a folder of that name).

    `num_train` is the size of the demo's training split; of a folder's it takes that many samples, drawn by `seed`, in
    file order. Samples without ground truth are left out and counted in `Dataset.num_dropped`. Raises DataError, with
    every bad line of all files, when the folder cannot be used.
    """
    if num_train is not None and num_train < 1:
        raise ValueError(f"num_train must be at least 1, got {num_train}")
    if source == "demo":
        from rankgrpo.data.demo import make_demo  # its catalog is read only when asked for

        return make_demo(seed=seed) if num_train is None else make_demo(num_train=num_train, seed=seed)
    folder = Path(source)
    catalog_path = _check_folder(folder)
    catalog, problems = read_catalog(catalog_path)
    splits: dict[str, list[Sample]] = {}
    num_dropped: dict[str, int] = {}
    errors: list[str] = []
    for name in SPLITS:
        samples, split_errors, split_problems = _scan_samples(folder / f"{name}.jsonl", catalog)
        splits[name] = [sample for sample in samples if sample.groundtruth]
        num_dropped[name] = len(samples) - len(splits[name])
        errors += split_errors
        problems += split_problems
    if errors:
        raise DataError(f"{folder}: {len(errors)} bad line(s):", errors)
    _check_usable(folder, splits, num_dropped, catalog, catalog_path)
    if num_train is not None:
        splits["train"] = _subset(folder, splits["train"], num_train, seed)
    return Dataset(folder.resolve().name, **splits, catalog=catalog, problems=problems, num_dropped=num_dropped)


def _check_folder(folder: Path) -> Path:
    """Path of the folder's catalog; DataError when a file is missing."""
    layout = "a data set is a folder with train.jsonl, validation.jsonl, test.jsonl and catalog.jsonl or catalog.csv"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}; {layout}, or the word demo for the built-in one")
    missing = [f"{name}.jsonl" for name in SPLITS if not (folder / f"{name}.jsonl").is_file()]
    catalogs = [folder / name for name in ("catalog.jsonl", "catalog.csv") if (folder / name).is_file()]
    if not catalogs:
        missing.append("catalog.jsonl or catalog.csv")
    if missing:
        there = sorted(path.name for path in folder.iterdir())[:10]
        raise DataError(f"{folder}: missing {', '.join(missing)}; there is {', '.join(there) or 'nothing'}; {layout}")
    if len(catalogs) > 1:
        raise DataError(f"{folder}: both catalog.jsonl and catalog.csv are there; keep the one that counts")
    return catalogs[0]


def _check_usable(
    folder: Path, splits: Mapping[str, list[Sample]], num_dropped: Mapping[str, int], catalog: Catalog, path: Path
) -> None:
    for name, samples in splits.items():
        if not samples:
            dropped = f" ({num_dropped[name]} have an empty ground truth)" if num_dropped[name] else ""
            raise DataError(f"{folder / name}.jsonl: no usable sample{dropped}; every split needs at least one")
    wanted = [item for name in SPLITS for sample in splits[name] for item in sample.groundtruth]
    if any(item in catalog for item in wanted):
        return
    examples = ", ".join(f"{title} ({year})" for title, year in wanted[:3])
    known = ", ".join(f"{item.title} ({item.year})" for item in catalog.items[:3])
    raise DataError(
        f"{path}: none of the {len(wanted)} ground-truth items of {folder} is in this catalog, so every reward would "
        f"be 0. Ground truth: {examples}, ... Catalog: {known}, ... Check that both come from the same source and that "
        "titles are written alike, without the year in the title"
    )


def _subset(folder: Path, samples: list[Sample], num_samples: int, seed: int) -> list[Sample]:
    if num_samples > len(samples):
        raise DataError(f"{folder}: num_train is {num_samples}, but there are {len(samples)} usable training samples")
    return [samples[index] for index in sorted(_permutation(len(samples), seed, 0)[:num_samples].tolist())]


_FIELDS = {"id", "conversation", "seen_titles", "groundtruth", "completion", "groundtruth_turn", "split"}


def _scan_samples(path: Path, catalog: Catalog | None) -> tuple[list[Sample], list[str], list[str]]:
    """(samples, errors, soft problems) of a file; see `read_samples`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; samples are JSONL, one conversation a line")
    samples: list[Sample] = []
    errors: list[str] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    unknown: set[str] = set()
    for line, row in read_jsonl(path):
        where = f"{path}:{line}"
        try:
            if isinstance(row, str):
                raise DataError(row)
            sample = _to_sample(row)
            if sample.id in first_line:
                raise DataError(f"id {sample.id!r} is already on line {first_line[sample.id]}; ids must be unique")
        except DataError as error:
            errors.append(f"{where}: {error}")
            continue
        first_line[sample.id] = line
        for name in sorted(_names(row) - unknown):
            unknown.add(name)
            problems.append(f"{where}: unknown field {name!r} is not used (reported once)")
        problems += [f"{where}: {problem}" for problem in _soft_problems(row, sample, path.stem, catalog)]
        samples.append(sample)
    return samples, errors, problems


def _names(row: Mapping[str, Any]) -> set[str]:
    """Unknown field names of a row and of its turns."""
    in_turns = {f"conversation.{name}" for turn in row["conversation"] for name in turn.keys() - {"role", "content"}}
    return (row.keys() - _FIELDS) | in_turns


def _to_sample(row: Mapping[str, Any]) -> Sample:
    if missing := {"id", "conversation", "seen_titles", "groundtruth"} - row.keys():
        raise DataError(f"missing {', '.join(sorted(missing))}")
    completion = row.get("completion")
    if not isinstance(row["id"], str) or not row["id"]:
        raise DataError(f"id must be a non-empty string, got {row['id']!r}")
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"completion must be a string, got {type_name(completion)}")
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
        groundtruth=tuple(dict.fromkeys(_to_title_year(entry, place) for place, entry in enumerate(groundtruth))),
        completion=completion,
    )


def _to_turn(turn: object, place: int) -> Turn:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise DataError(f"conversation[{place}] must be an object with role and content, got {type_name(turn)}")
    if turn["role"] not in ROLES:
        raise DataError(f"conversation[{place}].role must be one of {list(ROLES)}, got {turn['role']!r}")
    if not isinstance(turn["content"], str):
        raise DataError(f"conversation[{place}].content must be a string, got {type_name(turn['content'])}")
    return Turn(turn["role"], turn["content"])


def _to_title_year(entry: object, place: int) -> tuple[str, int]:
    name = f"groundtruth[{place}]"
    if not isinstance(entry, list) or len(entry) != 2:
        raise DataError(f"{name} must be [title, year], got {entry!r}")
    return _in_field(name, parse_title, entry[0]), _in_field(name, parse_year, entry[1])


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


def _soft_problems(row: Mapping[str, Any], sample: Sample, split: str, catalog: Catalog | None) -> list[str]:
    problems = []
    if not sample.groundtruth:
        problems.append(f"{sample.id}: ground truth is empty; the sample is left out of training and evaluation")
    if len(sample.groundtruth) < len(row["groundtruth"]):
        problems.append(f"{sample.id}: ground truth names an item twice; kept once")
    if split in SPLITS and row.get("split", split) != split:
        problems.append(f"{sample.id}: split says {row['split']!r}, the file is {split}.jsonl")
    if catalog is None:
        return problems
    for title, year in sample.groundtruth:
        if (title, year) not in catalog:
            problems.append(f"{sample.id}: ground truth {title} ({year}) is not in the catalog and can never be a hit")
    for title in sample.seen_titles:
        if not catalog.title_indices(title):
            problems.append(f"{sample.id}: seen title {title!r} is not in the catalog")
    return problems


def _to_row(sample: Sample) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": sample.id,
        "conversation": [{"role": turn.role, "content": turn.content} for turn in sample.conversation],
        "seen_titles": list(sample.seen_titles),
        "groundtruth": [list(title_year) for title_year in sample.groundtruth],
    }
    if sample.completion is not None:
        row["completion"] = sample.completion
    return row


# ----------------------------------------------------------------------------------------------------------------------
# The order of batches


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # Raw Philox words and a stable sort: numpy guarantees the stream of a bit generator across versions, and not that
    # of Generator.permutation.
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # shared by the cache
    return order


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Which samples step s trains on: a function of (seed, step), so any step can be resumed without history.

    Each epoch goes through all samples once in an order of its own; batches run on over the end of an epoch, so none is
    short. Process `dp_rank` of `dp_world` takes its contiguous share of each batch: shares in process order are the
    batch of a single process, and differ by one sample at most. Raises ValueError for impossible numbers.

    Example: BatchOrder(9638, 48, seed=1, dp_rank=0, dp_world=2).indices(step=7) -> 24 sample indices
    """

    num_samples: int
    batch_size: int
    """Samples a step over all processes."""
    seed: int
    dp_rank: int = 0
    dp_world: int = 1

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1 or self.dp_world < 1 or self.seed < 0:
            raise ValueError(f"num_samples, batch_size and dp_world must be at least 1 and seed at least 0, got {self}")
        if not 0 <= self.dp_rank < self.dp_world:
            raise ValueError(f"dp_rank must be in [0, {self.dp_world}), got {self.dp_rank}")
        if self.batch_size < self.dp_world:
            raise ValueError(f"batch_size {self.batch_size} must be at least the number of processes {self.dp_world}")

    def global_indices(self, step: int) -> list[int]:
        """Sample indices of the whole batch of `step` (counted from 0)."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        indices: list[int] = []
        while position < end:
            epoch, offset = divmod(position, self.num_samples)
            order = _permutation(self.num_samples, self.seed, epoch)
            indices += order[offset : offset + end - position].tolist()
            position = (epoch + 1) * self.num_samples
        return indices

    def indices(self, step: int) -> list[int]:
        """This process's share of `global_indices(step)`."""
        start, end = (rank * self.batch_size // self.dp_world for rank in (self.dp_rank, self.dp_rank + 1))
        return self.global_indices(step)[start:end]

    def num_steps(self, num_epochs: float) -> int:
        """Steps after which every sample has been used at least `num_epochs` times over."""
        return math.ceil(num_epochs * self.num_samples / self.batch_size)
