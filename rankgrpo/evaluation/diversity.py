"""What many lists a conversation find together, and how wide and how popular their choice is.

Every conversation has the same number M of lists, sampled at the temperature of training. The metrics:
  recall@K_of_n   Recall of the union of n lists, n = 1, 2, 4, ..., M: pass@n for lists (`metrics.union_recall`)
  ndcg@K          NDCG of a list, mean over the conversation's M
  coverage_of_n   share of the catalog recommended to anybody, with n lists a conversation, expected over which n
  popularity      mean over the recommended items of how often the training split's ground truth holds them
  hit_popularity  the same over the recommended items that are hits
  gini            of how often each catalog item is recommended, over all M lists
An item counts once a list, within its first K lines; lines outside the catalog count for nothing.
"""

# Shape letters: B samples, M lists a sample, N items of the catalog.

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankgrpo.data.samples import Sample
from rankgrpo.evaluation.evaluate import count_groundtruth, score_completions
from rankgrpo.files.atomic import write_lines
from rankgrpo.files.rows import read_jsonl
from rankgrpo.items.catalog import Catalog
from rankgrpo.metrics import bootstrap_interval, gini, union_chance, union_recall


@dataclass(frozen=True)
class Diversity:
    """Example: diversity.by_sample["recall@20_of_16"].mean()"""

    sample_ids: tuple[str, ...]
    num_lists: int
    by_sample: dict[str, Tensor]
    """Metric -> (B,) float64, for the metrics that a conversation has."""
    overall: dict[str, float]
    """The metrics that only all lists together have."""


@dataclass(frozen=True)
class _Group:
    """What the M lists of one conversation hold."""

    holding: Counter[int]
    """Catalog index -> number of lists that name it."""
    found: Counter[int]
    """Catalog index -> number of lists in which it is a hit."""
    num_groundtruth: int
    ndcg: float


def union_sizes(num_lists: int) -> list[int]:
    """The sizes n of the unions: 1, 2, 4, ... up to `num_lists`, and `num_lists` itself."""
    return [*(2**power for power in range(num_lists.bit_length()) if 2**power < num_lists), num_lists]


def describe_lists(
    samples: Sequence[Sample],
    completions: Sequence[Sequence[str]],
    catalog: Catalog,
    popularity_N: Tensor,
    *,
    num_ranks: int = 20,
    year_tolerance: int = 0,
) -> Diversity:
    """The metrics of the module's head; `completions` holds M answers a sample.

    Raises ValueError for no samples and for samples with different numbers of answers.
    """
    sizes = {len(texts) for texts in completions}
    if len(sizes) != 1 or len(samples) != len(completions) or 0 in sizes:
        raise ValueError(
            f"every sample needs the same number of lists, got {sorted(sizes)} for {len(completions)} of "
            f"{len(samples)} samples"
        )
    (num_lists,) = sizes
    groups = [
        _read_group(sample, texts, catalog, num_ranks, year_tolerance)
        for sample, texts in zip(samples, completions, strict=True)
    ]
    found = [list(group.found.values()) for group in groups]
    num_groundtruth = [group.num_groundtruth for group in groups]
    by_sample = {
        f"recall@{num_ranks}_of_{n}": union_recall(found, num_groundtruth, num_lists=num_lists, num_drawn=n)
        for n in union_sizes(num_lists)
    }
    by_sample[f"ndcg@{num_ranks}"] = torch.tensor([group.ndcg for group in groups], dtype=torch.float64)
    overall = {f"coverage_of_{n}": _coverage(groups, len(catalog), num_lists, n) for n in union_sizes(num_lists)}
    items, hits = Counter[int](), Counter[int]()
    for group in groups:
        items.update(group.holding)
        hits.update(group.found)
    for name, counts in (("popularity", items), ("hit_popularity", hits)):
        if counts:
            weight = sum(count * float(popularity_N[index]) for index, count in counts.items())
            overall[name] = weight / counts.total()
    if items:
        overall["gini"] = gini([items[index] for index in range(len(catalog))])
    return Diversity(tuple(sample.id for sample in samples), num_lists, by_sample, overall)


def _read_group(sample: Sample, texts: Sequence[str], catalog: Catalog, num_ranks: int, year_tolerance: int) -> _Group:
    evaluation = score_completions(
        [sample] * len(texts), texts, catalog, num_ranks=num_ranks, year_tolerance=year_tolerance
    )
    holding, found = Counter[int](), Counter[int]()
    for row in evaluation.rows:
        marks = [mark for mark in row["items"] if mark["in_catalog"] and not mark["duplicate"]]
        index = [catalog.lookup(mark["title"], mark["year"], year_tolerance=year_tolerance) for mark in marks]
        holding.update(index)
        found.update(i for i, mark in zip(index, marks, strict=True) if mark["hit"])
    ndcg = float(evaluation.metrics[f"ndcg@{num_ranks}"].mean())
    return _Group(holding, found, count_groundtruth(sample, catalog, year_tolerance), ndcg)


def _coverage(groups: Sequence[_Group], num_items: int, num_lists: int, num_drawn: int) -> float:
    """Expected share of the catalog in the union over all samples of `num_drawn` of their lists."""
    chance_M = union_chance(num_lists, num_drawn)
    missing_N = torch.ones(num_items, dtype=torch.float64)
    for group in groups:
        missing_N[list(group.holding)] *= 1 - chance_M[list(group.holding.values())]
    return float(1 - missing_N.mean())


# ---------------------------------------------------------------------------------------------------------- files


def summarise_lists(diversity: Diversity, *, name: str, split: str) -> dict[str, Any]:
    """Means, with 95 % bootstrap intervals for what a sample has, as `tables.format_table` reads them."""
    metrics: dict[str, dict[str, float]] = {}
    for key, values_B in diversity.by_sample.items():
        metrics[key] = dict(zip(("mean", "low", "high"), bootstrap_interval(values_B), strict=True))
    metrics |= {key: {"mean": value} for key, value in diversity.overall.items()}
    num_samples = len(diversity.sample_ids)
    return {
        "name": name,
        "split": split,
        "num_samples": num_samples,
        "num_lists": diversity.num_lists,
        "metrics": metrics,
    }


def diversity_path(run_dir: Path, split: str, name: str) -> Path:
    return run_dir / "diversity" / split / f"{name}.json"


def write_diversity(run_dir: Path, diversity: Diversity, *, name: str, split: str) -> Path:
    """Write `run_dir/diversity/<split>/<name>.json` and, by sample, `<name>.samples.jsonl`; returns the first."""
    path = diversity_path(run_dir, split, name)
    # The samples first: where there is a summary, there are its samples.
    rows = (
        {"id": sample_id, **{key: float(values_B[place]) for key, values_B in diversity.by_sample.items()}}
        for place, sample_id in enumerate(diversity.sample_ids)
    )
    write_lines(path.with_suffix(".samples.jsonl"), map(json.dumps, rows))
    write_lines(path, [json.dumps(summarise_lists(diversity, name=name, split=split), indent=1)])
    return path


def read_diversity(path: Path) -> Diversity:
    """What `write_diversity` wrote under `path`. Raises ValueError naming the file that is missing or broken."""
    samples_path = path.with_suffix(".samples.jsonl")
    if not (path.is_file() and samples_path.is_file()):
        raise ValueError(f"{path}: no such result; `rankgrpo evaluate --lists` and runs with eval.lists write it")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        overall = {key: value["mean"] for key, value in summary["metrics"].items() if "low" not in value}
        num_lists = summary["num_lists"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a result of many lists ({error}); delete it and evaluate again") from None
    rows: list[dict[str, Any]] = []
    for line, row in read_jsonl(samples_path):
        if isinstance(row, str) or rows and row.keys() != rows[0].keys():
            raise ValueError(f"{samples_path}:{line}: broken row; delete the file and evaluate again")
        rows.append(row)
    keys = [key for key in (rows[0] if rows else {}) if key != "id"]
    by_sample = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in keys}
    return Diversity(tuple(row["id"] for row in rows), num_lists, by_sample, overall)
