"""Scores as text: labels, numbers, and the comparison table of the terminal and of Markdown.

Numbers follow the papers of the field: four digits without the leading zero. Reads summaries as `evaluate.summarise`
returns them, computes nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LIST_METRICS = {
    "in_catalog_frac": "In catalog",
    "parsed_frac": "Parsed",
    "duplicate_frac": "Repeats",
    "items_mean": "Lines",
}
# Of many lists a conversation (`diversity.py`).
UNION_METRICS = {
    "coverage": "Catalog coverage",
    "popularity": "Popularity of the items",
    "hit_popularity": "Popularity of the hits",
    "gini": "Gini of the items",
}

MODEL_LABELS = {
    "before": "Before training",
    "sft": "After SFT",
    "rank-grpo": "After RL",
    "ease": "EASE",
    "popularity": "Popularity list",
}


def model_label(name: str) -> str:
    """What readers see for a model's name; names without a label stand for themselves."""
    return MODEL_LABELS.get(name, name)


def in_sentence(name: str) -> str:
    """The label as it reads inside a sentence: `after SFT`."""
    label = model_label(name)
    return label[0].lower() + label[1:] if label.startswith(("Before", "After")) else label


def main_metric(keys: Iterable[str]) -> str:
    """NDCG at the deepest cut."""
    return max((key for key in keys if key.startswith("ndcg@")), key=lambda key: int(key.split("@")[1]))


def is_accuracy(key: str) -> bool:
    """Recall and NDCG, of a list or of a union of lists: more is better. The other metrics describe the list."""
    return re.fullmatch(r"(recall|ndcg)@\d+(_of_\d+)?", key) is not None


def is_metric(key: str) -> bool:
    """Whether a key of a lists file is one of the metrics."""
    return is_accuracy(key) or key in LIST_METRICS


def metric_label(key: str) -> str:
    name, _, num_lists = key.partition("_of_")
    label = (LIST_METRICS | UNION_METRICS).get(name, name.replace("recall", "Recall").replace("ndcg", "NDCG"))
    return f"{label}, {num_lists} list{'s' if int(num_lists) > 1 else ''}" if num_lists else label


def format_value(key: str, value: float, *, sign: bool = False) -> str:
    """`.0482` for Recall, NDCG and Gini, `99.1%` for shares, `19.8` for counts.

    With `sign` as a difference: `+.0101`, `+0.4 pts` (percentage points), `-0.2`.
    """
    plus = "+" if sign else ""
    if is_accuracy(key) or key == "gini":
        return f"{value:{plus}.4f}".replace("0.", ".", 1)
    if key.endswith("_frac") or key.startswith("coverage"):
        return f"{100 * value:{plus}.1f}" + (" pts" if sign else "%")
    return f"{value:{plus}.1f}"


def format_interval(key: str, interval: Mapping[str, float], *, sign: bool = False) -> str:
    low, high = (format_value(key, interval[bound], sign=sign) for bound in ("low", "high"))
    return f"[{low.removesuffix(' pts').removesuffix('%')}, {high}]"


def format_table(summaries: Sequence[Mapping[str, Any]], *, markdown: bool = False, width: int | None = None) -> str:
    """Metrics as rows, models as columns, each cell a mean and its 95% interval where it has one.

    `*` (markdown: bold) marks the best Recall and NDCG of two or more models. As many models stand side by side as fit
    into `width` characters, by default the terminal's (160 where there is none).
    Raises ValueError for no summaries, and for summaries of different splits, which must not be compared.
    """
    if not summaries:
        raise ValueError("a table needs at least one evaluation")
    if len(splits := sorted({summary["split"] for summary in summaries})) > 1:
        raise ValueError(f"one table holds one split, got {', '.join(splits)}")
    keys = list(dict.fromkeys(key for summary in summaries for key in summary["metrics"]))
    labels = ["", *(metric_label(key) for key in keys)]
    sizes = sorted({summary["num_samples"] for summary in summaries})
    title = f"{splits[0]} split, {' or '.join(map(str, sizes))} conversations, mean [95% interval]"
    if markdown:
        columns = [labels, *(_column(summaries, summary, keys, best="**{}**") for summary in summaries)]
        rows = [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
        return "\n".join([f"{title[0].upper()}{title[1:]}:", "", rows[0], "|---" * len(columns) + "|", *rows[1:]])
    if width is None:
        width = shutil.get_terminal_size(fallback=(160, 24)).columns
    columns = [_padded(_column(summaries, summary, keys, best="{}*", other="{} ", pad=True)) for summary in summaries]
    blocks = [_block(block) for block in _fitting([_padded(labels), *columns], width)]
    note = ["* best of the row"] if len(summaries) > 1 else []
    return "\n".join([title, "", "\n\n".join(blocks), *note])


def _column(
    summaries: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    keys: Sequence[str],
    *,
    best: str,
    other: str = "{}",
    pad: bool = False,
) -> list[str]:
    """The model's name and its cells; `best` and `other` are formats for the mean, `pad` aligns means and intervals."""
    cells = [("-", "")] * len(keys)
    for place, key in enumerate(keys):
        if key in summary["metrics"]:
            interval = summary["metrics"][key]
            highest = max(model["metrics"][key]["mean"] for model in summaries if key in model["metrics"])
            is_best = is_accuracy(key) and len(summaries) > 1 and interval["mean"] == highest
            mean = (best if is_best else other).format(format_value(key, interval["mean"]))
            cells[place] = (mean, format_interval(key, interval) if "low" in interval else "")
    size = max(len(mean) for mean, _ in cells) if pad else 0
    return [summary["name"], *(f"{mean.rjust(size)} {interval}".rstrip() for mean, interval in cells)]


def _padded(column: list[str]) -> list[str]:
    size = max(map(len, column))
    return [cell.ljust(size) for cell in column]


def _fitting(columns: list[list[str]], width: int) -> list[list[list[str]]]:
    """Columns in groups that fit into `width`, each behind the first column again; a group has one of them at least."""
    head, *rest = columns
    blocks: list[list[list[str]]] = []
    for column in rest:
        if not blocks or len("  ".join(c[0] for c in [*blocks[-1], column])) > width:
            blocks.append([head])
        blocks[-1].append(column)
    return blocks


def _block(columns: list[list[str]]) -> str:
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
