"""A data set: the folder of files, or the built-in demo."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rankgrpo.data.candidates import catalog_of_candidates
from rankgrpo.data.demo import demo_catalog, make_demo
from rankgrpo.data.order import permutation
from rankgrpo.data.samples import SPLITS, Dataset, Sample, read_samples, scan_samples
from rankgrpo.errors import ConfigError, DataError
from rankgrpo.files.rows import Problem, read_jsonl
from rankgrpo.items.catalog import Catalog
from rankgrpo.items.format import FILM, ItemFormat, title_line
from rankgrpo.items.lines import open_catalog

DEMO = "demo"
CATALOG_NAMES = ("catalog.jsonl", "catalog.csv")
MAX_WEIGHT = {"linear": 1e30, "exp2": 100.0}
"""By gain; float32 holds 3e38, and the gains of a list are added."""


def load_catalog(source: str | os.PathLike[str], item_format: ItemFormat = FILM) -> Catalog:
    """The catalog of what `load_dataset` would load, without its samples. Raises DataError as that does."""
    if source == DEMO:
        return _check_demo(item_format)
    return _open_catalog(Path(source), item_format)[0]


def needs_candidates(source: str | os.PathLike[str]) -> bool:
    """Whether every training sample of a data set brings candidates: a model of it has learned to order what it is
    given, and knows no other prompt. Samples are read up to the first without."""
    train = Path(source) / "train.jsonl"
    if source == DEMO or not train.is_file():
        return False
    return all(isinstance(row, dict) and row.get("candidates") for _, row in read_jsonl(train))


def _open_catalog(folder: Path, item_format: ItemFormat) -> tuple[Catalog, list[Problem], Path]:
    """The catalog of a folder, what looks wrong with it, and its file; without a file that of all candidates."""
    if folder.is_dir() and not any((folder / name).is_file() for name in CATALOG_NAMES):
        paths = [folder / f"{name}.jsonl" for name in SPLITS]
        samples = [s for path in paths if path.is_file() for s in read_samples(path, item_format=item_format)[0]]
        if (catalog := catalog_of_candidates(samples, item_format)) is not None:
            return catalog, [], folder
    path = _check_folder(folder)
    return *open_catalog(path, item_format), path


def _check_demo(item_format: ItemFormat) -> Catalog:
    if not item_format.is_film:
        raise ConfigError(f"data.item = {item_format.template!r}: the items of the demo are {FILM.template!r}")
    return demo_catalog()


def load_dataset(
    source: str | os.PathLike[str],
    *,
    num_train: int | None = None,
    seed: int = 0,
    item_format: ItemFormat = FILM,
    gain: Literal["linear", "exp2"] = "linear",
) -> Dataset:
    """Load a folder, or make the built-in demo when `source` is "demo" (write "./demo" for a folder of that name).

    `num_train` is the size of the demo's training split; of a folder's it takes that many samples, drawn by `seed`, in
    file order. Items are written as `item_format` says, and `gain` turns weights into gains. Where every sample brings
    candidates, the folder needs no catalog. Samples without ground truth are left out and counted in
    `Dataset.num_dropped`. Raises DataError, with every bad line of all files, when the folder cannot be used.
    """
    if num_train is not None and num_train < 1:
        raise ValueError(f"num_train must be at least 1, got {num_train}")
    if source == DEMO:
        _check_demo(item_format)
        return make_demo(seed=seed) if num_train is None else make_demo(num_train=num_train, seed=seed)
    folder = Path(source)
    catalog, problems, catalog_path = _open_catalog(folder, item_format)
    splits: dict[str, list[Sample]] = {}
    num_dropped: dict[str, int] = {}
    errors: list[str] = []
    for name in SPLITS:
        samples, split_errors, split_problems = scan_samples(folder / f"{name}.jsonl", catalog)
        errors += [error for sample in samples if (error := _excess(sample, gain, folder / f"{name}.jsonl"))]
        splits[name] = [_with_gain(sample, gain) for sample in samples if sample.groundtruth]
        num_dropped[name] = len(samples) - len(splits[name])
        errors += split_errors
        problems += split_problems
    if errors:
        raise DataError(f"{folder}: {len(errors)} bad line(s):", errors)
    _check_usable(folder, splits, num_dropped, catalog, catalog_path)
    if num_train is not None:
        splits["train"] = _subset(folder, splits["train"], num_train, seed)
    return Dataset(folder.resolve().name, **splits, catalog=catalog, problems=problems, num_dropped=num_dropped)


def _excess(sample: Sample, gain: Literal["linear", "exp2"], path: Path) -> str:
    """What is wrong with a weight whose gain the sums of a list's gains could not hold."""
    weight = max(sample.weights, default=1.0)
    if weight <= MAX_WEIGHT[gain]:
        return ""
    way_out = "set data.gain=linear, or use grades such as 1 to 5" if gain == "exp2" else "use smaller units"
    limit = f"weight {weight:g} is above {MAX_WEIGHT[gain]:g}, with data.gain={gain}"
    return f"{path}: sample {sample.id!r}: {limit}; {way_out}"


def _with_gain(sample: Sample, gain: Literal["linear", "exp2"]) -> Sample:
    return replace(sample, gain=gain) if sample.weights and gain != sample.gain else sample


def _check_folder(folder: Path) -> Path:
    """Path of the folder's catalog; DataError when a file is missing."""
    layout = "a data set is a folder with train.jsonl, validation.jsonl, test.jsonl and catalog.jsonl or catalog.csv"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}; {layout}, or the word demo for the built-in one")
    missing = [f"{name}.jsonl" for name in SPLITS if not (folder / f"{name}.jsonl").is_file()]
    catalogs = [folder / name for name in CATALOG_NAMES if (folder / name).is_file()]
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
    examples = ", ".join(title_line(title, year) for title, year in wanted[:3])
    known = ", ".join(item.line for item in catalog.items[:3])
    raise DataError(
        f"{path}: none of the {len(wanted)} ground-truth items of {folder} is in this catalog, so every reward would "
        f"be 0. Ground truth: {examples}, ... Catalog: {known}, ... Check that both come from the same source and that "
        "titles are written alike, without the year in the title"
    )


def _subset(folder: Path, samples: list[Sample], num_samples: int, seed: int) -> list[Sample]:
    if num_samples > len(samples):
        raise DataError(f"{folder}: num_train is {num_samples}, but there are {len(samples)} usable training samples")
    return [samples[index] for index in sorted(permutation(len(samples), seed, 0)[:num_samples].tolist())]
