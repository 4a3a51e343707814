"""What a tracker gets of a finished run: results, the report's pictures, and the last lists that training sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankgrpo.evaluation.evaluate import read_evaluation
from rankgrpo.items.format import title_line
from rankgrpo.rollouts.record import read_rollouts
from rankgrpo.runtime.trackers import Tracker

COLUMNS = ("step", "conversation", "list", "reward", "hits", "tokens", "lines", "ground truth")
MAX_ROWS = 200


def send_results(tracker: Tracker, run_dir: Path) -> None:
    """Send the means of every evaluation of `run_dir`, its pictures and a table of sampled lists."""
    results = {}
    for path in sorted((run_dir / "eval").glob("*/*.json")):
        summary = read_evaluation(path)
        for key, interval in summary["metrics"].items():
            results[f"{path.parent.name}/{summary['name']}/{key}"] = interval["mean"]
    tracker.summary(results)
    for path in sorted((run_dir / "plots").glob("*.png")):
        tracker.picture(path.stem, path)
    rollouts = run_dir / "rl" / "rollouts.jsonl"
    if rollouts.is_file():
        tracker.table("sampled_lists", COLUMNS, sampled_rows(read_rollouts(rollouts)[0]))


def sampled_rows(groups: Sequence[dict[str, Any]], max_rows: int = MAX_ROWS) -> list[list[Any]]:
    """`COLUMNS` of the last lists, whole groups, at most `max_rows` lists."""
    chosen, count = [], 0
    for group in reversed(groups):
        count += len(group["lists"])
        if count > max_rows:
            break
        chosen.append(group)
    rows = []
    for group in reversed(chosen):
        truth = "\n".join(title_line(*entry) for entry in group["groundtruth"])
        for number, one in enumerate(group["lists"], start=1):
            reward = round(sum(value for value in one["reward"] if value is not None), 4)
            hits = sum("hit" in marks.split() for marks in one["marks"])
            tokens = one.get("num_tokens")
            rows.append([group["step"], group["id"], number, reward, hits, tokens, "\n".join(one["lines"]), truth])
    return rows
