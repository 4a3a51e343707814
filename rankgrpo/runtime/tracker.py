"""Metrics of a run: one JSON object a step in metrics.jsonl, a progress bar, TensorBoard when it is installed.

On resume the rows after the checkpoint are cut off, so the file reads as if the run had never stopped.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from rankgrpo.files.rows import read_jsonl

SHOWN = ("loss/nll", "reward/mean", "list/hit_frac", "loss/kl", "eval/ndcg@20", "grad/norm")


class MetricsLog:
    """Writes `path` row by row; rows after `resume_step` of an earlier run are dropped first."""

    def __init__(self, path: Path, *, resume_step: int, num_steps: int, title: str):
        self.path = path
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
        self.board = _tensorboard(path.parent / "tensorboard")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the row of `step` (optimizer steps done; 0 is the state before training)."""
        row = {"step": step, **metrics}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.bar.set_postfix({key.split("/")[-1]: f"{row[key]:.4g}" for key in SHOWN if key in row}, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.board is not None:
            for key, value in metrics.items():
                self.board.add_scalar(key, value, step)

    def close(self) -> None:
        self.file.close()
        self.bar.close()
        if self.board is not None:
            self.board.close()


def read_metrics(path: Path) -> tuple[list[dict], str | None]:
    """Rows of a metrics file, and what was wrong with a last line that a kill cut short (None when it is whole).

    Raises ValueError with file and line for any other broken row, and for one without a step.
    """
    rows = list(read_jsonl(path))
    cut_short = None
    if rows and isinstance(rows[-1][1], str):
        line, problem = rows.pop()
        cut_short = f"{path.parent.name}/{path.name}:{line} was skipped: {problem}, as after a kill while writing."
    for line, row in rows:
        if isinstance(row, str):
            raise ValueError(f"{path}:{line}: {row}; delete the line, or restore the file from the run")
        if type(row.get("step")) is not int:
            raise ValueError(f"{path}:{line}: a metrics row needs a whole number under 'step', got {row.get('step')!r}")
    return [row for _, row in rows], cut_short


def _tensorboard(folder: Path):
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
