"""A few conversations of the report, with the lists of the stages of training side by side.

They are chosen by a rule that cannot see which ones flatter the model. Plain values only; escaping is the template's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from rankgrpo.evaluation.evaluate import Evaluation
from rankgrpo.evaluation.tables import format_value, in_sentence, main_metric, metric_label, model_label
from rankgrpo.items.format import title_line

EXAMPLES_PER_KIND = 2


def choose_examples(ids: Sequence[str], old: Sequence[float], new: Sequence[float]) -> list[tuple[str, int]]:
    """(kind, index) of a few samples that scored better, worse and the same, in turn.

    Within a kind they are drawn by a hash of the sample's id: fixed for a data set, and blind to how they flatter.
    """
    drawn: dict[str, list[int]] = {"better": [], "worse": [], "same": []}
    for index in sorted(range(len(ids)), key=lambda index: hashlib.sha256(ids[index].encode()).digest()):
        kind = "better" if new[index] > old[index] else "worse" if new[index] < old[index] else "same"
        if len(drawn[kind]) < EXAMPLES_PER_KIND:
            drawn[kind].append(index)
    turns = range(EXAMPLES_PER_KIND)
    return [(kind, indices[turn]) for turn in turns for kind, indices in drawn.items() if turn < len(indices)]


def examples_context(
    lists: Mapping[str, Evaluation], pair: tuple[str, str], shown_names: Sequence[str]
) -> dict[str, Any]:
    """The conversations section: text, and a row an example with the lists of `shown_names` side by side.

    `pair` names the two evaluations of the same samples whose difference decides the kind of an example.
    """
    before, after = (lists[name] for name in pair)
    key = main_metric(before.metrics)
    old, new = before.metrics[key].tolist(), after.metrics[key].tolist()
    better, worse = (sum(sign * (b - a) > 0 for a, b in zip(old, new, strict=True)) for sign in (1, -1))
    rows = []
    for place, (kind, index) in enumerate(choose_examples(before.sample_ids, old, new)):
        row = after.rows[index]
        shown = [_example_list(name, lists[name], row["id"], key) for name in shown_names]
        rows.append(
            {
                "kind": kind,
                "open": place < 3,
                "id": row["id"],
                "scores": f"{metric_label(key)} {format_value(key, old[index])} → {format_value(key, new[index])}",
                "turns": row.get("conversation", []),
                "groundtruth": ", ".join(title_line(*entry) for entry in row.get("groundtruth", [])),
                "lists": [one for one in shown if one],
            }
        )
    text = (
        f"Of {len(old)} conversations, {better} scored better {in_sentence(pair[1])} than {in_sentence(pair[0])} "
        f"({metric_label(key)}), {worse} worse and {len(old) - better - worse} the same. Shown are up to "
        f"{EXAMPLES_PER_KIND} of each kind, drawn by a hash of the conversation's id and not picked by hand; all kinds "
        "are shown alike, however common they are."
    )
    return {"text": text, "rows": rows}


def _example_list(name: str, evaluation: Evaluation, sample_id: str, key: str) -> dict[str, Any] | None:
    if sample_id not in evaluation.sample_ids:
        return None
    row = evaluation.rows[evaluation.sample_ids.index(sample_id)]
    more = int(row.get("items_mean", 0)) - len(row["items"])
    return {
        "label": model_label(name),
        "score": f"{metric_label(key)} {format_value(key, row[key])}",
        "lines": [_example_item(mark) for mark in row["items"]],
        "more": f"… and {more} more line{'s' if more > 1 else ''} than asked for" if more > 0 else "",
    }


def _example_item(mark: Mapping[str, Any]) -> dict[str, str]:
    if mark["title"] is None:
        return {"text": mark.get("line", ""), "css": "unparsed", "mark": "unreadable"}
    text = title_line(mark["title"], mark["year"])
    if mark["hit"]:
        return {"text": text, "css": "hit", "mark": "hit"}
    if not mark["in_catalog"]:
        return {"text": text, "css": "out", "mark": "not in catalog"}
    marks = [word for word, given in (("seen", mark["seen"]), ("repeat", mark.get("duplicate", False))) if given]
    return {"text": text, "css": "", "mark": ", ".join(marks)}
