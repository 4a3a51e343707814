"""`rankgrpo data import`: recognise a format, read it, and write the project's folder, whole or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from rankgrpo.data.dialogs import PLAIN_WORDS, dialog_ids
from rankgrpo.data.importers.catalogs import in_natural_order, read_items
from rankgrpo.data.importers.common import Imported, Notes
from rankgrpo.data.importers.redial import Choice, is_redial, read_redial
from rankgrpo.data.importers.saved import find_saved, read_saved
from rankgrpo.data.importers.tables import find_tables, read_tables
from rankgrpo.data.load import load_dataset
from rankgrpo.data.samples import SPLITS, Candidate, Dataset, Sample, write_samples
from rankgrpo.errors import DataError
from rankgrpo.files.atomic import atomic_folder
from rankgrpo.items.catalog import Catalog, Item, normalise_title
from rankgrpo.items.format import FILM, ItemFormat
from rankgrpo.items.lines import make_catalog

Format = Literal["auto", "redial", "saved", "table"]
CATALOG_NAMES = ("catalog.jsonl", "catalog.csv", "gt_catalog.pkl", "catalog.pkl")
FORMATS = """what can be imported:
  redial  redial_dataset.zip or its folder: train_data.jsonl, test_data.jsonl, movies_with_mentions.csv
  saved   a folder that Hugging Face's save_to_disk wrote, or a folder of such folders (the released Reddit-v2)
  table   a .jsonl, .json, .csv or .parquet file with a sample a row, or a folder with train, validation and test as
          such files"""


@dataclass(frozen=True)
class ImportOptions:
    """Choices that a format may need."""

    format: Format = "auto"
    item: ItemFormat = FILM
    """How an item is written; other than films are read from tables, with a catalog."""
    catalog: Path | None = None
    """Catalog file; else the source's own, else every film of the ground truth."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns of a table: our field -> theirs."""
    groundtruth: Choice = "accepted"
    """Which of the recommender's films are ground truth in ReDial."""
    validation_frac: float = 0.1
    """Share of the training conversations that become a missing validation split."""
    test_frac: float = 0.1
    seed: int = 0


def import_dataset(source: Path, out: Path, options: ImportOptions) -> tuple[str, Dataset]:
    """Write the folder `out`; returns what was done, and the data set that is there now.

    Raises DataError when the source cannot be read or the result could not be trained on, and leaves nothing behind.
    """
    if out.exists():
        raise DataError(f"{out} exists; remove it, or name another folder")
    if not source.exists():
        raise DataError(f"{source} does not exist; {FORMATS}")
    for name, frac in (("validation_frac", options.validation_frac), ("test_frac", options.test_frac)):
        if not 0 < frac < 1:
            raise DataError(f"{name} must be between 0 and 1, got {frac}")
    notes = Notes()
    given = options.catalog or _own_catalog(source)
    if given is None and not options.item.is_film:
        raise DataError(f"items written {options.item.template!r} need a catalog with these columns: --catalog FILE")
    items = read_items(given, notes, options.item) if given is not None else []
    if options.item.is_film:
        items = in_natural_order(items, notes)
    imported = _read(source, options, make_catalog(items, options.item) if items else None)
    splits = _complete(_usable(imported, notes), options, notes)
    if not items:
        items = in_natural_order(imported.items or _named_items(splits), notes)
        splits = _under_catalog_titles(splits, Catalog(items))
    items = _with_popularity(items, splits["train"])
    with atomic_folder(out) as folder:
        for name in SPLITS:
            write_samples(folder / f"{name}.jsonl", splits[name])
        make_catalog(items, options.item).to_jsonl(folder / "catalog.jsonl")
        dataset = replace(_load(folder, out, options.item), name=out.name)
    lines = [f"imported {imported.what} into {out}", str(imported.notes), str(notes)]
    return "\n".join(line for line in lines if line), dataset


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """The columns written as OURS=THEIRS: {"conversation": "dialog"} from ["conversation=dialog"]."""
    columns = {}
    for word in words:
        name, separator, column = word.partition("=")
        if not (separator and name and column):
            raise DataError(f"--columns {word!r}: expected FIELD=COLUMN, for example conversation=dialog")
        columns[name.strip()] = column.strip()
    return columns


def detect_format(source: Path) -> Format:
    """The one format that a source has; DataError when it has none or several."""
    found: list[Format] = []
    if is_redial(source):
        found.append("redial")
    if source.is_dir() and find_saved(source):
        found.append("saved")
    if find_tables(source):
        found.append("table")
    if len(found) > 1:
        raise DataError(f"{source}: looks like {' and '.join(found)} at once; say which by --format")
    if not found:
        there = sorted(path.name for path in source.iterdir())[:10] if source.is_dir() else []
        holds = f", which holds {', '.join(there) or 'nothing'}" if source.is_dir() else ""
        raise DataError(f"{source}{holds}: not a known format; {FORMATS}")
    return found[0]


def _read(source: Path, options: ImportOptions, catalog: Catalog | None) -> Imported:
    chosen = detect_format(source) if options.format == "auto" else options.format
    if not options.item.is_film and chosen != "table":
        raise DataError(f"--item belongs to tables and logs of interactions, and {source} is {chosen}: films")
    if options.columns and chosen != "table":
        raise DataError(f"--columns belongs to tables, and {source} is {chosen}")
    if chosen == "redial":
        return read_redial(source, choice=options.groundtruth, validation_frac=options.validation_frac)
    if chosen == "saved":
        return read_saved(source, catalog=catalog)
    return read_tables(source, catalog=catalog, columns=options.columns)


def _own_catalog(source: Path) -> Path | None:
    """A catalog that lies in the source folder."""
    found = [source / name for name in CATALOG_NAMES if (source / name).is_file()] if source.is_dir() else []
    if len(found) > 1:
        raise DataError(f"{source}: several catalogs: {', '.join(p.name for p in found)}; name one by --catalog")
    return found[0] if found else None


def _usable(imported: Imported, notes: Notes) -> dict[str, list[Sample]]:
    """Splits without the samples that have no ground truth."""
    usable = {}
    for split, samples in imported.splits.items():
        usable[split] = [sample for sample in samples if sample.groundtruth]
        for sample in samples:
            if not sample.groundtruth:
                notes.add("samples without ground truth, left out", f"{split}: {sample.id}")
    if not usable.get("train"):
        raise DataError(f"{imported.what}: no training sample with ground truth", str(imported.notes).splitlines())
    return usable


def _complete(splits: Mapping[str, list[Sample]], options: ImportOptions, notes: Notes) -> dict[str, list[Sample]]:
    """All three splits: what is missing is taken from the training split, whole dialogs drawn by the seed."""
    splits = {name: list(samples) for name, samples in splits.items()}
    for place, (name, frac) in enumerate((("validation", options.validation_frac), ("test", options.test_frac))):
        if splits.get(name):
            continue
        groups = _groups(splits["train"])
        num_groups = max(groups) + 1
        if num_groups < 2:
            raise DataError(f"no {name} split, and all training samples are of one dialog: none can be taken from it")
        order = np.random.default_rng([options.seed, place]).permutation(num_groups)
        drawn = set(order[: max(1, round(frac * num_groups))].tolist())
        marked = list(zip(groups, splits["train"], strict=True))
        splits[name] = [sample for group, sample in marked if group in drawn]
        splits["train"] = [sample for group, sample in marked if group not in drawn]
        notes.add("splits missing in the source, drawn from train", f"{name}: {len(splits[name])} samples")
    return splits


def _groups(samples: Sequence[Sample]) -> list[int]:
    """By sample the number of what stays in one split: a dialog, and dialogs that open with the same telling words.

    Two answers to one question make two dialogs of a forum, and what is right for one is a hint for the other.
    """
    names: list[object] = []
    for sample, dialog in zip(samples, dialog_ids(samples), strict=True):
        opening = sample.conversation[0].content  # that of all samples of a dialog, each of which begins another
        tells = sample.dialog is None and len(opening.split()) >= PLAIN_WORDS
        names.append(opening if tells else dialog)
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return [order[name] for name in names]


def _named_items(splits: Mapping[str, Sequence[Sample]]) -> list[Item]:
    """Every film of any ground truth and of any candidates, each once."""
    items: dict[tuple[str, int], Item] = {}
    for name in SPLITS:
        for sample in splits[name]:
            candidates = [(candidate.title, candidate.year) for candidate in sample.candidates]
            for title, year in (*sample.groundtruth, *candidates):
                items.setdefault((normalise_title(title), year), Item(title, year))
    return list(items.values())


def _under_catalog_titles(splits: Mapping[str, list[Sample]], catalog: Catalog) -> dict[str, list[Sample]]:
    """Samples whose ground truth and candidates are called as the catalog calls them."""

    def named(title: str, year: int) -> tuple[str, int]:
        index = catalog.lookup(title, year)
        known = index is None or catalog.has_title(index, title)
        return title if known else catalog.items[index].title, year

    def renamed(sample: Sample) -> Sample:
        weight_of: dict[tuple[str, int], float] = {}
        for item, weight in zip(sample.groundtruth, sample.weights or [1.0] * len(sample.groundtruth), strict=True):
            weight_of[named(*item)] = max(weight, weight_of.get(named(*item), 0.0))
        candidates: dict[tuple[str, int], Candidate] = {}
        for candidate in sample.candidates:
            item = named(candidate.title, candidate.year)
            candidates.setdefault(item, replace(candidate, title=item[0]))
        return replace(
            sample,
            groundtruth=tuple(weight_of),
            weights=tuple(weight_of.values()) if sample.weights else (),
            candidates=tuple(candidates.values()),
        )

    return {name: [renamed(sample) for sample in samples] for name, samples in splits.items()}


def _load(folder: Path, out: Path, item_format: ItemFormat) -> Dataset:
    """What was written, read back; errors name the folder that it is to become."""
    try:
        return load_dataset(folder, item_format=item_format)
    except DataError as error:
        raise DataError(str(error).replace(str(folder), str(out))) from None


def _with_popularity(items: Sequence[Item], train: Sequence[Sample]) -> list[Item]:
    """Items with how often the training ground truth has them, unless the catalog says so itself."""
    if any(item.popularity for item in items):
        return list(items)
    counts = Counter((normalise_title(title), year) for sample in train for title, year in sample.groundtruth)
    return [replace(item, popularity=counts[normalise_title(item.title), item.year]) for item in items]
