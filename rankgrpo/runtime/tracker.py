"""Metrics of a run: one JSON object a step in metrics.jsonl, a progress bar, and a tracker where one is asked for.

On resume the rows after the checkpoint are cut off, so the file reads as if the run had never stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from rankgrpo.files.rows import read_log

if TYPE_CHECKING:
    from rankgrpo.runtime.trackers import Tracker

SHOWN = ("loss/nll", "reward/mean", "list/hit_frac", "loss/kl", "eval/ndcg@20", "grad/norm")


class MetricsLog:
    """Writes `path` row by row; rows after `resume_step` of an earlier run are dropped first.

    tracker: gets every row, as one of the phase that the folder of `path` is named after.
    """

    def __init__(self, path: Path, *, resume_step: int, num_steps: int, title: str, tracker: Tracker | None = None):
        self.path, self.tracker = path, tracker
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(path)[0] if path.exists() else []
        kept = [row for row in rows if row["step"] <= resume_step] if resume_step > 0 else []
        temporary = path.with_name(f".incomplete-{path.name}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
        self.file = path.open("a", encoding="utf-8")
        self.bar = tqdm(
            total=num_steps, initial=resume_step, desc=title, unit="step", dynamic_ncols=True, mininterval=1.0
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the row of `step` (optimizer steps done; 0 is the state before training)."""
        row = {"step": step, **metrics}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.bar.set_postfix({key.split("/")[-1]: f"{row[key]:.4g}" for key in SHOWN if key in row}, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.tracker is not None:
            self.tracker.log(self.path.parent.name, step, metrics)

    def close(self) -> None:
        self.file.close()
        self.bar.close()


def read_metrics(path: Path) -> tuple[list[dict], str | None]:
    """Rows of a metrics file, and what was wrong with a last line that a kill cut short (None when it is whole).

    Raises ValueError with file and line for any other broken row, and for one without a step.
    """
    rows, cut_short = read_log(path)
    for line, row in rows:
        if isinstance(row, str):
            raise ValueError(f"{path}:{line}: {row}; delete the line, or restore the file from the run")
        if type(row.get("step")) is not int:
            raise ValueError(f"{path}:{line}: a metrics row needs a whole number under 'step', got {row.get('step')!r}")
    return [row for _, row in rows], cut_short
