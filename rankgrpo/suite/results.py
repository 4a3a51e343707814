"""What the complete runs of a suite are worth, as one compact JSON without any text of the data.

Everything the page and the figures show is in it, so both can be made again without the runs. A row is the mean over
its seeds: every conversation's scores are averaged over the seeds first, and the bootstrap resamples conversations, so
the intervals are those of this set of trained models and say nothing about further seeds; the scores by seed stand
beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rankgrpo.config_file import own_keys
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.diversity import Diversity, read_diversity, summarise_lists
from rankgrpo.evaluation.evaluate import Evaluation, compare, mean_evaluation, read_lists, summarise
from rankgrpo.files.atomic import write_lines
from rankgrpo.metrics import paired_bootstrap
from rankgrpo.report.build import read_curves
from rankgrpo.report.figures import Curves, curve_matrix, rank_keys, thin
from rankgrpo.suite.runs import PlannedRun, machine_of
from rankgrpo.suite.spec import BASELINE_ROWS, NO_START, OWN_START, Row, Suite, row_config

FORMAT = 1
MAX_POINTS = 60  # of a curve
VALIDATION_CURVES = ("eval/ndcg@", "eval/recall@", "eval/duplicate_frac", "eval/in_catalog_frac", "loss/val_nll")
TRAINING_CURVES = (
    "list/hits_mean", "list/duplicate_frac", "list/in_catalog_frac", "policy/entropy", "reward/zero_std_frac",
    "grad/norm", "ratio/clip_low_frac", "ratio/clip_high_frac", "loss/kl",
)  # fmt: skip


def collect_results(
    suite: Suite, runs: Sequence[PlannedRun], data_name: str, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """Results of the complete runs, and the rows of `earlier` that the suite still has unchanged.

    Of a row that is in both, the one with more seeds counts, and of equally many the complete runs. Raises ValueError
    for runs that were evaluated on different conversations.
    """
    boards = {}
    for model in suite.models:
        old = earlier["boards"].get(model) if earlier else None
        old = old or {"rows": []}
        board = _Board(suite, model, [run for run in runs if run.model == model and run.is_done])
        boards[model] = {**old, **board.facts, "rows": _with_earlier(board.results(), suite, old["rows"], model)}
    return {
        "format": FORMAT,
        "suite": suite.name,
        "data": data_name,
        "title": suite.title,
        "about": suite.about,
        "against": list(suite.against),
        "against_union": list(suite.against_union),
        "ablation": list(suite.ablation),
        "paper": {model: list(tables) for model, tables in suite.paper.items()},
        "boards": boards,
    }


def _with_earlier(rows: list[dict], suite: Suite, earlier: list[dict], model: str) -> list[dict]:
    chosen = {row["name"]: row for row in rows}
    recipes = [recipe(row, model) for row in suite.rows]
    for old in earlier:
        new = chosen.get(old["name"])
        unchanged = old["name"] in BASELINE_ROWS or old["recipe"] in recipes
        if unchanged and (new is None or len(old["by_seed"]) > len(new["by_seed"])):
            chosen[old["name"]] = old
    if not any(name in chosen for name in suite.row_names):
        return []
    return [chosen[name] for name in (*BASELINE_ROWS, *suite.row_names) if name in chosen]


def recipe(row: Row, model: str) -> dict[str, Any]:
    """What a row computes, as it is recorded; a row of another recipe is another row.

    `config` has what preset, method and overrides come to, so that a changed preset is a changed recipe.
    """
    return {
        "name": row.name,
        "stage": row.stage,
        "start": row.start,
        "method": row.method,
        "set": list(row.overrides_for(model)),
        "config": own_keys(row_config(row, model, data="", seed=0)),
    }


class _Board:
    """The complete runs of one model, with their scores by conversation."""

    def __init__(self, suite: Suite, model: str, runs: Sequence[PlannedRun]):
        self.suite, self.model = suite, model
        self.runs = {row.name: [run for run in runs if run.row.name == row.name] for row in suite.rows}
        self.runs = {name: found for name, found in self.runs.items() if found}
        self.scores: dict[str, Evaluation] = {}
        self.by_seed: dict[str, dict[str, dict[str, float]]] = {}
        self.unions: dict[str, Diversity] = {}
        for name, found in self.runs.items():
            self._add(name, [(run, run.stage) for run in found])
        by_stage = sorted(runs, key=lambda run: run.row.stage != "sft")
        for name in BASELINE_ROWS:
            source = next((run for run in by_stage if run.evaluation(name).is_file()), None)
            if source is not None:
                self._add(name, [(source, name)])
        self.facts = self._facts(runs)

    def _add(self, name: str, sources: list[tuple[PlannedRun, str]]) -> None:
        evaluations = [_read_scores(run.evaluation(stage).with_suffix(".lists.jsonl")) for run, stage in sources]
        self.scores[name] = mean_evaluation(evaluations)
        self.by_seed[name] = {
            str(run.seed): {key: _round(float(values.mean())) for key, values in evaluation.metrics.items()}
            for (run, _), evaluation in zip(sources, evaluations, strict=True)
        }
        described = [read_diversity(run.diversity(stage)) for run, stage in sources if run.diversity(stage).is_file()]
        if described:
            self.unions[name] = mean_diversity(described)

    def _facts(self, runs: Sequence[PlannedRun]) -> dict[str, Any]:
        if not runs:
            return {}
        sizes = {len(evaluation.sample_ids) for evaluation in self.scores.values()}
        if len(sizes) > 1:
            raise ConfigError(f"the rows of {self.model} were evaluated on {sorted(sizes)} conversations, not alike")
        return {
            "split": runs[0].config.eval.split,
            "num_samples": sizes.pop(),
            "num_ranks": runs[0].config.data.num_ranks,
            "num_draws": runs[0].config.eval.draws,
            "num_lists": max((union.num_lists for union in self.unions.values()), default=1),
            "num_union_samples": max((len(union.sample_ids) for union in self.unions.values()), default=0),
        }

    def results(self) -> list[dict[str, Any]]:
        bar = tqdm(
            self.scores, desc=f"intervals of {self.model}", unit="row", disable=not self.scores, dynamic_ncols=True
        )
        return [self._result(name) for name in bar]

    def _result(self, name: str) -> dict[str, Any]:
        evaluation, split = self.scores[name], self.facts["split"]
        summary = summarise(evaluation, name=name, split=split)
        start = self.suite.row(name).start if name in self.runs else NO_START
        bases = {key: start if key == OWN_START else key for key in self.suite.against}
        result = {
            "name": name,
            "metrics": _rounded(summary["metrics"]),
            "by_seed": self.by_seed[name],
            "hit_rate_by_rank": _rounded(summary["hit_rate_by_rank"]),
            "gain": {key: self._gain(name, base) for key, base in bases.items() if self._comparable(name, base)},
        }
        if name in self.unions:
            union = summarise_lists(self.unions[name], name=name, split=split)
            result["union"] = _rounded(union["metrics"])
            result["union_gain"] = {
                other: self._union_gain(name, other)
                for other in self.suite.against_union
                if self._comparable(name, other) and other in self.unions
            }
        if name in self.runs:
            row, runs = self.suite.row(name), self.runs[name]
            result |= {
                "label": row.label, "about": row.about, "group": row.group, "recipe": recipe(row, self.model),
                "machine": {key: machine_of(runs[0]).get(key) for key in ("machine", "commit")},
                **_cost(runs), "curves": _curves(runs),
            }  # fmt: skip
        return result

    def _comparable(self, name: str, other: str) -> bool:
        return name != other and name in self.scores and other in self.scores

    def _gain(self, name: str, other: str) -> dict[str, Any]:
        """Difference and relative gain of NDCG at the first and the last cut and of Recall, paired by conversation."""
        old, new = self.scores[other], self.scores[name]
        ndcg = [key for key in new.metrics if key.startswith("ndcg@")]
        keys = dict.fromkeys((ndcg[0], ndcg[-1], ndcg[-1].replace("ndcg", "recall")))
        old, new = (replace(one, metrics={key: one.metrics[key] for key in keys}) for one in (old, new))
        gains = compare(old, new)
        return _rounded({key: {part: gain[part] for part in ("difference", "relative")} for key, gain in gains.items()})

    def _union_gain(self, name: str, other: str) -> dict[str, Any]:
        old, new = self.unions[other], self.unions[name]
        if old.sample_ids != new.sample_ids:
            raise ValueError(f"{name} and {other} have lists of different conversations; remove one and run it again")
        gains = {}
        for key, values_B in new.by_sample.items():
            if key not in old.by_sample:
                continue  # a baseline has one list
            gains[key] = dict(zip(("mean", "low", "high"), paired_bootstrap(values_B, old.by_sample[key]), strict=True))
        gains |= {key: {"mean": new.overall[key] - old.overall[key]} for key in new.overall if key in old.overall}
        return _rounded(gains)


def _read_scores(path: Path) -> Evaluation:
    return replace(read_lists(path), rows=[])  # the texts take most of the memory


def mean_diversity(found: Sequence[Diversity]) -> Diversity:
    """`mean_evaluation` for what the union of lists finds."""
    first = found[0]
    if any(one.sample_ids != first.sample_ids or one.num_lists != first.num_lists for one in found):
        raise ValueError("the seeds of a row have lists of different conversations, or different numbers of them")
    by_sample = {key: torch.stack([one.by_sample[key] for one in found]).mean(0) for key in first.by_sample}
    overall = {
        key: sum(one.overall[key] for one in found) / len(found)
        for key in first.overall
        if all(key in one.overall for one in found)
    }
    return Diversity(first.sample_ids, first.num_lists, by_sample, overall)


# ---------------------------------------------------------------------------------------------------------- cost


def _read_run_curves(run: PlannedRun) -> Curves:
    path = run.folder / ("sft" if run.row.stage == "sft" else "rl") / "metrics.jsonl"
    return read_curves(path)[0] if path.is_file() else {}


def _cost(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Means over the seeds: hours and tokens of the training that the row itself did, and the steps kept."""
    curves = [_read_run_curves(run) for run in runs]
    curves = [one for one in curves if "time/total_s" in one]
    if not curves:  # the warm start was given
        return {}

    def mean_total(key: str) -> float:
        return sum(float(np.nansum(one[key][1])) for one in curves if key in one) / len(curves)

    links = [run.folder / "rl" / "best" for run in runs]
    best = [int(os.readlink(link).rsplit("-", 1)[1]) for link in links if link.is_symlink()]
    return {
        "cost": {
            "hours": _round(mean_total("time/total_s") / 3600),
            "tokens_sampled": round(mean_total("tokens/sampled")),
            "tokens_trained": round(mean_total("tokens/trained")),
            "steps": int(max(one["time/total_s"][0][-1] for one in curves)),
            "kept_steps": best,
        }
    }


def _curves(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """metric -> [steps, values], means over the seeds at the steps that all have; rewards by rank as one matrix."""
    found = [_read_run_curves(run) for run in runs]
    curves: dict[str, Any] = {}
    for key in found[0]:
        if key.startswith(VALIDATION_CURVES) or key in TRAINING_CURVES:
            steps, values = thin(*mean_curve([one[key] for one in found if key in one]), MAX_POINTS)
            curves[key] = [_rounded(steps.tolist()), _rounded(values.tolist())]
    by_rank = {key: mean_curve([one[key] for one in found]) for key in rank_keys(found[0], "reward/rank_")}
    if by_rank:
        matrix_KS, steps = curve_matrix(by_rank, list(by_rank), max_columns=MAX_POINTS)
        curves["reward_by_rank"] = [_rounded(steps.tolist()), _rounded(matrix_KS.tolist())]
    return curves


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over curves at the steps that all of them have."""
    steps = curves[0][0]
    for other, _ in curves[1:]:
        steps = np.intersect1d(steps, other)
    values = [values[np.isin(at, steps)] for at, values in curves]
    return steps, np.mean(values, axis=0)


# ---------------------------------------------------------------------------------------------------------- files


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results.json with one row of a board a line: a changed row is a changed line."""
    boards = results["boards"]
    lines = ["{"]
    lines += [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in results.items() if key != "boards"]
    lines.append(' "boards": {')
    for model_place, (model, board) in enumerate(boards.items()):
        lines.append(f"  {json.dumps(model)}: {{")
        lines += [f"   {json.dumps(key)}: {json.dumps(value)}," for key, value in board.items() if key != "rows"]
        lines.append('   "rows": [')
        rows = [f"    {json.dumps(row)}" for row in board["rows"]]
        lines += [row + "," for row in rows[:-1]] + rows[-1:]
        lines += ["   ]", "  }" + ("," if model_place < len(boards) - 1 else "")]
    write_lines(path, [*lines, " }", "}"])


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json. Raises ValueError naming the file when it is no result of a suite."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}; restore the file, or delete it") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT or "boards" not in results:
        raise ValueError(f"{path}: not the results of a suite (format {FORMAT}); restore the file, or delete it")
    return results


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _rounded(value: Any) -> Any:
    """Four digits of every number in a JSON value; what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return _round(value) if np.isfinite(value) else None
    return value
