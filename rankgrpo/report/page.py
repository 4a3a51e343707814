"""What stands on the report page: every sentence, number and mark, as plain values for the template.

Numbers come from the evaluation files and the metrics curves; the only thing computed here is the paired comparison of
two models. Escaping is the template's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankgrpo.evaluation.evaluate import Evaluation, compare
from rankgrpo.evaluation.tables import (
    format_interval,
    format_value,
    in_sentence,
    is_accuracy,
    main_metric,
    metric_label,
    model_label,
)
from rankgrpo.report.diagnosis import Evidence, diagnose
from rankgrpo.report.examples import examples_context
from rankgrpo.report.figures import Curves, RunCurves, phase_seconds
from rankgrpo.report.plots import DrawnPlot

STAGES = ("before", "sft", "rank-grpo")
MODEL_ORDER = (*STAGES, "ease", "popularity")
SHORT_NAMES = {"before": "the start", "sft": "SFT", "rank-grpo": "RL"}
SECTION_TEXTS = {
    "learning": ("What it learned", "How the lists changed while the model trained."),
    "health": (
        "Was the training healthy?",
        "Signs that tell learning from falling apart: gradients that still arrive, a policy that stays near its start, "
        "lists that keep their form.",
    ),
    "cost": ("What it cost", "Time and tokens by phase. Validation counts as a phase of its own where it was timed."),
}
GLOSSARY = (
    ("Recall@k", "Share of the items the user went on to like that are among the first k lines."),
    (
        "NDCG@k",
        "Hits among the first k lines, each worth 1 / log2(rank + 1), divided by what the best possible list would "
        "earn (all liked items on top). Lines keep their places: an unreadable line or an item outside the catalog "
        "still takes up its rank.",
    ),
    (
        "In catalog, parsed, repeats",
        "Shares of the lines within the asked-for length: lines that name a catalog item, lines of the form Title "
        "(Year), lines that name an earlier line's item again. An empty list counts as 0.",
    ),
    ("Lines", "Non-blank lines of the answer; more and fewer than asked for are both possible."),
    ("Before training", "The model as it was when the run began."),
    ("After SFT", "After supervised training on the teacher's lists: the start of reinforcement learning."),
    ("After RL", "After reinforcement learning: Rank-GRPO (arXiv 2510.20150), or the method named in the settings."),
    ("EASE", "A closed-form item-to-item model (Steck 2019); the teacher of the warm start."),
    ("Popularity list", "The same most popular items for everybody: what personal advice must beat."),
    (
        "95% interval",
        "Percentile bootstrap over the conversations of the split. It holds the trained model fixed and says nothing "
        "about other training seeds.",
    ),
)


@dataclass(frozen=True)
class RunRecord:
    """All that was found in a run folder."""

    name: str
    curves: RunCurves
    lists: dict[str, Evaluation]
    """Model name -> its lists on the headline split."""
    config: dict[str, Any]
    meta: dict[str, Any]
    notes: list[str]
    """What is missing or was skipped, one sentence each."""

    @property
    def split(self) -> str:
        return self.curves.headline_split or ""

    @property
    def summaries(self) -> list[dict[str, Any]]:
        """Evaluations of the headline split."""
        return self.curves.evaluations.get(self.split, [])


def page_context(
    run: RunRecord, drawn: Sequence[DrawnPlot], notes: Sequence[str], viewer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The variables of `template.html`. viewer: those of its part viewer.html, where there are sampled lists."""
    pair, comparison_notes = _comparable_pair(run)
    gains = compare(run.lists[pair[0]], run.lists[pair[1]]) if pair else {}
    examples = examples_context(run.lists, pair, [name for name in STAGES if name in run.lists]) if pair else None
    why = diagnose(Evidence(run.curves.rl, run.config, run.lists, pair, gains or None))
    plot_sections = [section for section in _plot_sections(run, drawn) if section["plots"] or section["table"]]
    sections = [
        ("result", "Result"),
        *([("why", "Why did RL hurt?")] if why else []),
        *((section["anchor"], section["label"]) for section in plot_sections),
    ]
    sections += [("examples", "Conversations")] if examples else []
    sections += [("rollouts", "Sampled lists")] if viewer else []
    splits = sorted(run.curves.evaluations, key=lambda split: (split != run.split, split))
    return {
        "title": f"Rank-GRPO run: {run.name}",
        "subtitle": _subtitle(run),
        "sections": [*sections, ("facts", "Run facts")],
        "notes": [*notes, *comparison_notes],
        "sentences": _sentences(run, pair, gains),
        "tiles": _tiles(run, pair, gains),
        "bars": _bars(run),
        "tables": [_table(split, run.curves.evaluations[split]) for split in splits],
        "gain": _gain_table(pair, gains) if pair else None,
        "why": why,
        "plot_sections": plot_sections,
        "examples": examples,
        "viewer": viewer,
        "facts": _facts(run),
        "glossary": GLOSSARY,
    }


# ---------------------------------------------------------------------------------------------------------- result


def _comparable_pair(run: RunRecord) -> tuple[tuple[str, str] | None, list[str]]:
    """The last stage of training whose lists there are, after the one before it."""
    stages = [name for name in STAGES if name in run.lists]
    if len(stages) < 2:
        return None, []
    before, after = stages[-2:]
    if run.lists[before].sample_ids != run.lists[after].sample_ids:
        return None, [
            f"{model_label(before)} and {model_label(after)} were evaluated on different samples and are not compared."
        ]
    return (before, after), []


def _percent(value: float) -> str:
    return f"{100 * value:+.1f}%"


def _percent_interval(interval: Mapping[str, float]) -> str:
    return f"[{_percent(interval['low'])}, {_percent(interval['high'])}]"


def _sentences(run: RunRecord, pair: tuple[str, str] | None, gains: Mapping[str, Any]) -> list[str]:
    if not run.summaries:
        return ["This run has not been evaluated yet; the curves show how far it has come."]
    if pair is None:
        return [f"Scores of {len(run.summaries)} model(s) on the {run.split} split."]
    key = main_metric(gains)
    gain = gains[key]
    low, high = gain["difference"]["low"], gain["difference"]["high"]
    if low > 0:
        verdict = "The 95% interval of the difference lies above zero: the lists got better."
    elif high < 0:
        verdict = "The 95% interval of the difference lies below zero: the lists got worse."
    else:
        verdict = "The 95% interval of the difference holds zero: no difference is shown."
    old, new = format_value(key, gain["baseline"]), format_value(key, gain["candidate"])
    relative = f", a change of {_percent(gain['relative']['mean'])}" if gain["relative"] else ""
    first = (
        f"On {len(run.lists[pair[0]].sample_ids)} {run.split} conversations, {metric_label(key)} is {old} "
        f"{in_sentence(pair[0])} and {new} {in_sentence(pair[1])}{relative}. {verdict}"
    )
    means = {summary["name"]: summary["metrics"].get(key, {}).get("mean") for summary in run.summaries}
    baselines = [
        f"{label} {format_value(key, means[name])}"
        for name, label in (("popularity", "the popularity list reaches"), ("ease", "EASE, the teacher, reaches"))
        if means.get(name) is not None
    ]
    return [first, f"For comparison: {' and '.join(baselines)}."] if baselines else [first]


def _tiles(run: RunRecord, pair: tuple[str, str] | None, gains: Mapping[str, Any]) -> list[dict[str, str]]:
    tiles = []
    stages = [summary for summary in run.summaries if summary["name"] in STAGES]
    if stages:
        name, metrics = stages[-1]["name"], stages[-1]["metrics"]
        key = main_metric(metrics)
        value = format_value(key, metrics[key]["mean"])
        tiles.append(_tile(f"{metric_label(key)} {in_sentence(name)}", value, format_interval(key, metrics[key])))
    if pair and (gain := gains[main_metric(gains)])["relative"]:
        interval = _percent_interval(gain["relative"])
        tiles.append(
            _tile(
                f"{metric_label(main_metric(gains))} against {SHORT_NAMES[pair[0]]}",
                _percent(gain["relative"]["mean"]),
                interval,
            )
        )
    if stages and "in_catalog_frac" in metrics:
        value = format_value("in_catalog_frac", metrics["in_catalog_frac"]["mean"])
        tiles.append(_tile("Lines that name a catalog item", value, in_sentence(name)))
    seconds = _stage_seconds(run)
    if seconds:
        parts = " · ".join(f"{label} {_duration(value)}" for label, value in seconds.items())
        tiles.append(_tile("Training time", _duration(sum(seconds.values())), parts))
    return tiles


def _tile(label: str, value: str, detail: str) -> dict[str, str]:
    return {"label": label, "value": value, "detail": detail}


def _bars(run: RunRecord) -> dict[str, Any] | None:
    if not run.summaries:
        return None
    key = main_metric(run.summaries[0]["metrics"])
    intervals = [(summary["name"], summary["metrics"][key]) for summary in run.summaries if key in summary["metrics"]]
    full = max(interval["high"] for _, interval in intervals) or 1.0
    rows = [
        {
            "label": model_label(name),
            "css": name if name in MODEL_ORDER else "other",
            "value": format_value(key, interval["mean"]),
            "width": round(100 * interval["mean"] / full, 2),
            "low": round(100 * interval["low"] / full, 2),
            "span": round(100 * (interval["high"] - interval["low"]) / full, 2),
        }
        for name, interval in intervals
    ]
    return {"title": f"{metric_label(key)} on the {run.split} split", "rows": rows}


def _table(split: str, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = list(dict.fromkeys(key for summary in summaries for key in summary["metrics"]))
    groups = {"Recall": [], "NDCG": [], "The list": []}
    for key in keys:
        group = metric_label(key).split("@")[0] if is_accuracy(key) else "The list"
        groups[group].append(key)
    groups = {label: found for label, found in groups.items() if found}
    columns = [
        {
            "key": key,
            "label": f"@{key.split('@')[1]}" if is_accuracy(key) else metric_label(key),
            "first": key == found[0],
        }
        for found in groups.values()
        for key in found
    ]
    rows = [
        {
            "label": model_label(summary["name"]),
            "cells": [_table_cell(summaries, summary, column) for column in columns],
        }
        for summary in summaries
    ]
    return {
        "title": f"All scores on the {split} split",
        "num_samples": " or ".join(str(size) for size in sorted({summary["num_samples"] for summary in summaries})),
        "groups": [{"label": label, "span": len(found)} for label, found in groups.items()],
        "columns": columns,
        "rows": rows,
    }


def _table_cell(summaries: Sequence[Mapping], summary: Mapping, column: Mapping[str, Any]) -> dict[str, Any]:
    key = column["key"]
    if key not in summary["metrics"]:
        return {"mean": "", "interval": "", "best": False, "first": column["first"]}
    interval = summary["metrics"][key]
    best = max(other["metrics"][key]["mean"] for other in summaries if key in other["metrics"])
    return {
        "mean": format_value(key, interval["mean"]),
        "interval": format_interval(key, interval).strip("[]%").replace(", ", "–"),
        "best": is_accuracy(key) and len(summaries) > 1 and interval["mean"] == best,
        "first": column["first"],
    }


def _gain_table(pair: tuple[str, str], gains: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for key, gain in gains.items():
        relative = gain["relative"] if is_accuracy(key) else None
        rows.append(
            {
                "label": metric_label(key),
                "baseline": format_value(key, gain["baseline"]),
                "candidate": format_value(key, gain["candidate"]),
                "difference": format_value(key, gain["difference"]["mean"], sign=True),
                "difference_interval": format_interval(key, gain["difference"], sign=True),
                "relative": _percent(relative["mean"]) if relative else "",
                "relative_interval": _percent_interval(relative) if relative else "",
            }
        )
    before, after = model_label(pair[0]), model_label(pair[1])
    title = f"{SHORT_NAMES[pair[1]]} against {SHORT_NAMES[pair[0]]}"
    return {"title": title, "from_label": before, "to_label": after, "rows": rows}


# ---------------------------------------------------------------------------------------------------------- curves


def _plot_sections(run: RunRecord, drawn: Sequence[DrawnPlot]) -> list[dict[str, Any]]:
    return [
        {
            "anchor": anchor,
            "label": label,
            "text": text,
            "plots": [one for one in drawn if one.plot.section == anchor],
            "table": _cost_table(run) if anchor == "cost" else None,
        }
        for anchor, (label, text) in SECTION_TEXTS.items()
    ]


def _cost_table(run: RunRecord) -> dict[str, Any] | None:
    rows = []
    for label, curves in (("SFT", run.curves.sft), ("RL", run.curves.rl)):
        seconds = {name: _total(values) for name, (_, values) in phase_seconds(curves).items()}
        if "time/total_s" in curves:
            rest = _total(curves["time/total_s"][1]) - sum(seconds.values())
            seconds |= {"other": rest} if rest > 0.005 * sum(seconds.values()) else {}
        for name, value in seconds.items():
            tokens = {"sample": "tokens/sampled", "update": "tokens/trained"}.get(name, "")
            count = _total(curves[tokens][1]) if tokens in curves else None
            share = f"{100 * value / sum(seconds.values()):.1f}%" if sum(seconds.values()) > 0 else ""
            speed = f"{count / value:,.0f}" if count is not None and value > 0 else ""
            rows.append((f"{label}: {name}", _duration(value), share, "" if count is None else f"{count:,.0f}", speed))
    head = ("Phase", "Time", "Share of the stage", "Tokens", "Tokens a second")
    return {"head": head, "rows": rows} if rows else None


def _total(values: np.ndarray) -> float:
    return float(np.nansum(values))


def _stage_seconds(run: RunRecord) -> dict[str, float]:
    stages = {"SFT": run.curves.sft, "RL": run.curves.rl}
    return {label: _total(curves["time/total_s"][1]) for label, curves in stages.items() if "time/total_s" in curves}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# ---------------------------------------------------------------------------------------------------------- facts


def _subtitle(run: RunRecord) -> str:
    model, data = run.config.get("model", {}).get("name"), run.config.get("data", {}).get("path")
    parts = [f"Model {model}" if model else "", f"data {data}" if data else ""]
    for label, curves in (("SFT", run.curves.sft), ("RL", run.curves.rl)):
        parts += [f"{last_step(curves)} {label} steps"] if curves else []
    return " · ".join(part for part in parts if part)


def last_step(curves: Curves) -> int:
    return max((int(steps[-1]) for steps, _ in curves.values()), default=0)


def _facts(run: RunRecord) -> list[dict[str, Any]]:
    training = []
    for label, curves in (("SFT", run.curves.sft), ("RL", run.curves.rl)):
        if curves:
            training.append((f"{label} steps", str(last_step(curves))))
        if "time/total_s" in curves:
            training.append((f"{label} time", _duration(_total(curves["time/total_s"][1]))))
        for key, words in (("tokens/sampled", "tokens sampled"), ("tokens/trained", "tokens trained on")):
            if key in curves:
                training.append((f"{label} {words}", f"{_total(curves[key][1]):,.0f}"))
        if "tokens/saved_frac" in curves:
            saved = float(np.nanmean(curves["tokens/saved_frac"][1]))
            training.append((f"{label} tokens saved by sharing prompts", f"{100 * saved:.1f}%"))
        if "tokens/cut_frac" in curves:
            cut = float(np.nanmean(curves["tokens/cut_frac"][1]))
            training.append((f"{label} tokens after a list's last one with a gradient, left out", f"{100 * cut:.1f}%"))
    groups = [
        {"title": "Training", "rows": training, "open": True},
        {"title": "Machine and versions (meta.json)", "rows": flatten(run.meta), "open": True},
        {"title": "Settings (config.toml)", "rows": flatten(run.config), "open": False},
    ]
    return [{"text": ""} | group for group in groups if group["rows"]]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) of nested tables, in their order."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)
            rows.append((f"{prefix}{key}", text))
    return rows
