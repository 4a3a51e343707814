"""From completions to scores: per-sample metrics, their means with intervals, comparisons, tables and files.

One definition for every model and baseline, in training and after it: text is read by `rankgrpo.parse`, hits are
`rankgrpo.reward.relevance`, Recall and NDCG are `rankgrpo.metrics`. Positions are kept in place: nothing is dropped
from a list before it is scored. Models are not seen here, only what they
answered.

Metrics of a sample, over its first K = `num_ranks` lines:
  recall@k, ndcg@k   k in 5, 10, 15, 20 or other cut-offs (those below K, and K itself); see `rankgrpo.metrics`. NDCG
                     goes by the gains of a ground truth with weights. The ground truth is a set of catalog items; one
                     that the catalog does not hold, or that was already seen, can never be hit and still counts.
  parsed_frac        share of these lines that have the form of an item, `Title (Year)` unless data.item says otherwise
  in_catalog_frac    share of these lines that name a catalog item
  duplicate_frac     share of these lines that name an earlier line's item again
  items_mean         number of lines in the whole answer, more than K if there are more; short lists show here and not
                     in the shares
The three shares are 0 for an empty answer. Means are over samples, so every conversation weighs the same. A sample may
have several answers, drawn with other luck: its scores are then their means.
"""

# Shape letters: N samples, K ranks.

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankgrpo.data.candidates import sample_catalog
from rankgrpo.data.dialogs import seen_lines
from rankgrpo.data.samples import Sample
from rankgrpo.evaluation.tables import LIST_METRICS, format_table, is_metric
from rankgrpo.files.atomic import write_lines
from rankgrpo.files.rows import read_jsonl
from rankgrpo.items.catalog import Catalog
from rankgrpo.metrics import (
    bootstrap_interval,
    graded_ndcg_at_k,
    hit_rate_by_rank,
    ndcg_at_k,
    paired_bootstrap,
    recall_at_k,
)
from rankgrpo.parse import ListedItem
from rankgrpo.reward import relevance

__all__ = [
    "CUTOFFS",
    "Evaluation",
    "compare",
    "count_groundtruth",
    "format_table",
    "mean_evaluation",
    "read_evaluation",
    "read_lists",
    "score_completions",
    "score_items",
    "summarise",
    "write_evaluation",
]

CUTOFFS = (5, 10, 15, 20)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on N samples.

    Example: evaluation.metrics["ndcg@20"].mean()
    """

    sample_ids: tuple[str, ...]
    metrics: dict[str, Tensor]
    """Metric name -> (N,) float64, one value a sample, in the order of `sample_ids`."""
    hits: Tensor
    """Whether each rank is a hit, (N, K): 0 or 1, or means of these."""
    rows: list[dict[str, Any]]
    """What a `.lists.jsonl` file holds: conversation, ground truth, answer, marks of every line, metrics. With several
    answers it holds the first, and as metrics and `hit_by_rank` the means of all."""


# ---------------------------------------------------------------------------------------------------------- scoring


def score_completions(
    samples: Sequence[Sample],
    completions: Sequence[str],
    catalog: Catalog,
    *,
    num_ranks: int = 20,
    year_tolerance: int = 0,
    cutoffs: Sequence[int] = CUTOFFS,
) -> Evaluation:
    """Score one answer a sample. No samples give an empty evaluation, as a process without a share of them needs.

    Raises ValueError for different lengths and for a sample without ground truth.
    """
    _check_same_length(samples, completions, "completions")
    catalogs = [sample_catalog(sample, catalog) for sample in samples]
    lists = [of_sample.parse(text) for of_sample, text in zip(catalogs, completions, strict=True)]
    return _score(samples, completions, lists, catalog, num_ranks, year_tolerance, cutoffs)


def score_items(
    samples: Sequence[Sample],
    ranked_items: Sequence[Sequence[int]],
    catalog: Catalog,
    *,
    num_ranks: int = 20,
    year_tolerance: int = 0,
    cutoffs: Sequence[int] = CUTOFFS,
) -> Evaluation:
    """Score lists of catalog indices (popularity, EASE), best first, just as if a model had written them.

    Raises ValueError as `score_completions` does, and for an index outside the catalog.
    """
    _check_same_length(samples, ranked_items, "ranked_items")
    lists, texts = [], []
    for sample, indices in zip(samples, ranked_items, strict=True):
        indices = [int(index) for index in indices]
        if wrong := [index for index in indices if not 0 <= index < len(catalog)]:
            raise ValueError(
                f"sample {sample.id!r}: {wrong[0]} is no catalog index; they go from 0 to {len(catalog) - 1}"
            )
        items = [catalog.items[index] for index in indices]
        lists.append([ListedItem(item.title, item.year, (0, 0)) for item in items])
        texts.append("\n".join(item.line for item in items))
    return _score(samples, texts, lists, catalog, num_ranks, year_tolerance, cutoffs)


def _check_same_length(samples: Sequence[Sample], answers: Sequence[object], name: str) -> None:
    if len(samples) != len(answers):
        raise ValueError(f"{name} must have one entry a sample: {len(samples)} samples, {len(answers)} {name}")
    if empty := [sample.id for sample in samples if not sample.groundtruth]:
        raise ValueError(f"sample {empty[0]!r} has no ground truth ({len(empty)} such); leave it out of the evaluation")


def _score(
    samples: Sequence[Sample],
    texts: Sequence[str],
    lists: Sequence[Sequence[ListedItem]],
    catalog: Catalog,
    num_ranks: int,
    year_tolerance: int,
    cutoffs: Sequence[int],
) -> Evaluation:
    gains, counts, shares, rows = [], [], [], []
    for sample, text, items in zip(samples, texts, lists, strict=True):
        own = sample_catalog(sample, catalog)
        relevance_K = relevance(
            items,
            sample.groundtruth,
            catalog=own,
            seen=sample.seen_titles,
            num_ranks=num_ranks,
            year_tolerance=year_tolerance,
            gains=sample.gains,
        )
        seen = seen_lines(items[:num_ranks], sample, catalog, year_tolerance)
        marks = _mark_items(items[:num_ranks], text, relevance_K, seen, own, year_tolerance)
        gains.append(relevance_K)
        counts.append(count_groundtruth(sample, catalog, year_tolerance))
        shares.append(_list_metrics(marks, num_lines=len(items)))
        rows.append(_row(sample, text, marks))
    gain_NK = torch.stack(gains) if gains else torch.zeros(0, num_ranks)
    hits_NK = (gain_NK > 0).float()
    num_groundtruth_N = torch.tensor(counts, dtype=torch.long)
    cutoffs = [k for k in cutoffs if k < num_ranks] + [num_ranks]
    metrics = {f"recall@{k}": recall_at_k(hits_NK, num_groundtruth_N, k) for k in cutoffs}
    if any(sample.weights for sample in samples):
        found = [gains_to_find(sample, catalog, year_tolerance).values() for sample in samples]
        best = [torch.tensor(sorted(gains, reverse=True)) for gains in found]
        best_NJ = pad_sequence(best, batch_first=True)
        metrics |= {f"ndcg@{k}": graded_ndcg_at_k(gain_NK, best_NJ, k) for k in cutoffs}
    else:
        metrics |= {f"ndcg@{k}": ndcg_at_k(hits_NK, num_groundtruth_N, k) for k in cutoffs}
    metrics |= {name: torch.tensor([share[name] for share in shares], dtype=torch.float64) for name in LIST_METRICS}
    for index, row in enumerate(rows):
        row |= {name: float(values[index]) for name, values in metrics.items()}
    return Evaluation(tuple(sample.id for sample in samples), metrics, hits_NK, rows)


def count_groundtruth(sample: Sample, catalog: Catalog, year_tolerance: int = 0) -> int:
    """Number of different items there are to find."""
    return len(gains_to_find(sample, catalog, year_tolerance))


def gains_to_find(sample: Sample, catalog: Catalog, year_tolerance: int) -> dict[int | tuple[str, int | None], float]:
    """What each different item that there is to find is worth, by `item_key`, in the order of the ground truth."""
    gain_of: dict[int | tuple[str, int | None], float] = {}
    for (title, year), gain in zip(sample.groundtruth, sample.gains, strict=True):
        key = item_key(title, year, catalog, year_tolerance)
        gain_of[key] = max(gain, gain_of.get(key, 0.0))
    return gain_of


def item_key(title: str, year: int | None, catalog: Catalog, year_tolerance: int) -> int | tuple[str, int | None]:
    """What makes two lines the same item: the catalog item, or title and year where the catalog has none."""
    index = catalog.lookup(title, year, year_tolerance=year_tolerance)
    return (catalog.title_key(title), year) if index is None else index


def _mark_items(
    items: Sequence[ListedItem],
    text: str,
    relevance_K: Tensor,
    seen: Sequence[bool],
    catalog: Catalog,
    year_tolerance: int,
) -> list[dict[str, Any]]:
    marks, earlier = [], set()
    for rank, item in enumerate(items):
        mark = {"title": item.title, "year": item.year, "in_catalog": False, "hit": False, "seen": False}
        mark["duplicate"] = False
        if item.title is None:
            mark["line"] = text[slice(*item.chars)]
        else:
            key = item_key(item.title, item.year, catalog, year_tolerance)
            mark["in_catalog"] = isinstance(key, int)
            mark["hit"] = bool(relevance_K[rank])
            mark["seen"] = seen[rank]
            mark["duplicate"] = key in earlier
            earlier.add(key)
        marks.append(mark)
    return marks


def _list_metrics(marks: Sequence[Mapping[str, Any]], num_lines: int) -> dict[str, float]:
    num_scored = max(len(marks), 1)
    return {
        "in_catalog_frac": sum(mark["in_catalog"] for mark in marks) / num_scored,
        "parsed_frac": sum(mark["title"] is not None for mark in marks) / num_scored,
        "duplicate_frac": sum(mark["duplicate"] for mark in marks) / num_scored,
        "items_mean": float(num_lines),
    }


def _row(sample: Sample, text: str, marks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": sample.id,
        "conversation": [{"role": turn.role, "content": turn.content} for turn in sample.conversation],
        "groundtruth": [list(title_year) for title_year in sample.groundtruth],
        **({"gains": list(sample.gains)} if sample.weights else {}),
        "completion": text,
        "items": marks,
    }


def mean_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Every sample's scores averaged over evaluations of the same samples.

    Raises ValueError for different samples.
    """
    first = evaluations[0]
    if any(one.sample_ids != first.sample_ids for one in evaluations):
        raise ValueError("scores can be averaged over evaluations of the same conversations only; evaluate all on them")
    if len(evaluations) == 1:
        return first
    metrics = {key: torch.stack([one.metrics[key] for one in evaluations]).mean(0) for key in first.metrics}
    hits_NK = torch.stack([one.hits for one in evaluations]).mean(0)
    # Whoever needs the scores alone has dropped the rows, which are most of the memory.
    rows = [
        {**row, "hit_by_rank": hits_K, **{key: float(values_N[index]) for key, values_N in metrics.items()}}
        for index, (row, hits_K) in enumerate(zip(first.rows, hits_NK.tolist(), strict=bool(first.rows)))
    ]
    return Evaluation(first.sample_ids, metrics, hits_NK, rows)


# ---------------------------------------------------------------------------------------------------------- summaries


def summarise(evaluation: Evaluation, *, name: str, split: str) -> dict[str, Any]:
    """Mean and 95 % bootstrap interval of every metric, and the hit rate by rank: what `<name>.json` holds.

    Raises ValueError for an evaluation without samples.
    """
    if not evaluation.sample_ids:
        raise ValueError(f"nothing to summarise: {name!r} was evaluated on no sample of the {split} split")
    metrics = {}
    for key, values_N in evaluation.metrics.items():
        metrics[key] = dict(zip(("mean", "low", "high"), bootstrap_interval(values_N), strict=True))
    return {
        "name": name,
        "split": split,
        "num_samples": len(evaluation.sample_ids),
        "metrics": metrics,
        "hit_rate_by_rank": hit_rate_by_rank(evaluation.hits).tolist(),
    }


def compare(baseline: Evaluation, candidate: Evaluation) -> dict[str, dict[str, Any]]:
    """Gain of `candidate` over `baseline` on the same samples, with paired 95 % bootstrap intervals.

    Returns, by metric, {"baseline": mean, "candidate": mean, "difference": {"mean", "low", "high"}, "relative": the
    same for candidate / baseline - 1}; "relative" is None where the baseline's mean is 0.
    Raises ValueError unless both hold the same samples in the same order.
    """
    if baseline.sample_ids != candidate.sample_ids:
        pairs = zip(baseline.sample_ids, candidate.sample_ids, strict=False)
        first = next((f"{a!r} against {b!r}" for a, b in pairs if a != b), "one holds more samples than the other")
        raise ValueError(
            f"a paired comparison needs the same samples in the same order, got {len(baseline.sample_ids)} and "
            f"{len(candidate.sample_ids)} ({first}); evaluate both on the same split and number of samples"
        )
    gains = {}
    for key in (key for key in baseline.metrics if key in candidate.metrics):
        old_N, new_N = baseline.metrics[key], candidate.metrics[key]
        relative = paired_bootstrap(new_N, old_N, relative=True) if old_N.mean() > 0 else None
        gains[key] = {
            "baseline": float(old_N.mean()),
            "candidate": float(new_N.mean()),
            "difference": dict(zip(("mean", "low", "high"), paired_bootstrap(new_N, old_N), strict=True)),
            "relative": relative and dict(zip(("mean", "low", "high"), relative, strict=True)),
        }
    return gains


# ---------------------------------------------------------------------------------------------------------- files


def write_evaluation(run_dir: str | Path, evaluation: Evaluation, *, name: str, split: str) -> Path:
    """Write `run_dir/eval/<split>/<name>.json` and `<name>.lists.jsonl`, each complete or not at all.

    Returns the path of the first. Raises ValueError for a name or split that is no plain file name.
    """
    for kind, word in (("model name", name), ("split", split)):
        if not re.fullmatch(r"[\w@+-][\w.@+-]*", word):
            raise ValueError(f"a {kind} becomes a file name: letters, digits and . _ - + @ only, got {word!r}")
    folder = Path(run_dir) / "eval" / split
    summary = summarise(evaluation, name=name, split=split)
    # The lists first: where there is a summary, there are its lists.
    write_lines(folder / f"{name}.lists.jsonl", (json.dumps(row, ensure_ascii=False) for row in evaluation.rows))
    path = folder / f"{name}.json"
    write_lines(path, [json.dumps(summary, indent=1, ensure_ascii=False)])
    return path


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """The summary that `write_evaluation` wrote. Raises ValueError, naming the file, if it is missing or not one."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such evaluation; `rankgrpo evaluate` writes them")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: broken JSON: {error.msg}; delete the file and evaluate again"
        ) from None
    problem = _summary_problem(summary)
    if problem:
        raise ValueError(f"{path}: not an evaluation: {problem}; delete the file and evaluate again")
    return summary


def _summary_problem(summary: Any) -> str | None:
    kinds = {"name": str, "split": str, "num_samples": int, "metrics": dict, "hit_rate_by_rank": list}
    if not isinstance(summary, dict):
        return "expected a JSON object"
    for key, kind in kinds.items():
        if not isinstance(summary.get(key), kind):
            return f"{key!r} is missing or of the wrong type"
    for key, interval in summary["metrics"].items():
        numbers = interval if isinstance(interval, dict) else {}
        if not all(isinstance(numbers.get(bound), int | float) for bound in ("mean", "low", "high")):
            return f"metrics[{key!r}] needs the numbers mean, low and high"
    return None if any(key.startswith("ndcg@") for key in summary["metrics"]) else "it holds no ndcg@k"


def read_lists(path: str | Path) -> Evaluation:
    """The evaluation behind a `.lists.jsonl` file. Raises ValueError naming file and line of a broken row."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `rankgrpo evaluate` writes it beside the summary")
    rows: list[dict[str, Any]] = []
    names: list[str] = []
    for line, row in read_jsonl(path):
        if isinstance(row, str):
            raise ValueError(f"{path}:{line}: {row}; delete the file and evaluate again")
        names = names or [key for key in row if is_metric(key)]
        if missing := {"id", "items", "completion", *names} - row.keys():
            raise ValueError(f"{path}:{line}: {sorted(missing)} missing; delete the file and evaluate again")
        rows.append(row)
    if not any(name.startswith("ndcg@") for name in names):
        raise ValueError(f"{path}: no rows with metrics; delete the file and evaluate again")
    num_ranks = max(int(name.split("@")[1]) for name in names if name.startswith("ndcg@"))
    hits_NK = torch.zeros(len(rows), num_ranks)
    for index, row in enumerate(rows):
        for rank, hit in enumerate(row.get("hit_by_rank") or [mark["hit"] for mark in row["items"]]):
            hits_NK[index, rank] = float(hit)
    metrics = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names}
    return Evaluation(tuple(row["id"] for row in rows), metrics, hits_NK, rows)
