"""The report of a run: one self-contained HTML page and the PNG figures, from the files of a run folder.

It works on an incomplete run: what is missing is left out and named on the page. Everything read is written as text
(escaped), the figures are embedded, and the page loads nothing, so it opens offline and can be sent as one file.

This module reads the folder; `plots.py` makes the figures, `viewer.py` packs the sampled lists, `page.py` says what
stands on the page, and `template.html` how it looks. None of them evaluates, trains or changes anything else in the
folder.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from rankgrpo.config_file import load_config, read_toml
from rankgrpo.data.prompt import LENGTHS_FILE
from rankgrpo.evaluation.evaluate import read_evaluation, read_lists
from rankgrpo.evaluation.tables import model_label
from rankgrpo.files.atomic import write_lines
from rankgrpo.report.figures import Curves, RunCurves
from rankgrpo.report.page import MODEL_ORDER, STAGES, RunRecord, last_step, page_context
from rankgrpo.report.plots import draw_plots
from rankgrpo.report.viewer import viewer_context
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.runtime.trouble import find_troubles


def build_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` and `run_dir/plots/*.png`; returns the path of the page.

    Raises ValueError for a folder without a run in it, and for a broken file (naming file and line). A last metrics
    line that was cut short, as a kill leaves it, is skipped and mentioned on the page.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    drawn, left_out = draw_plots(run.curves, run_dir / "plots")
    notes = run.notes + _left_out_notes(run, [f"{plot.title} (needs {plot.needs})" for plot in left_out])
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    viewer = viewer_context(run_dir / "rl" / "rollouts.jsonl", notes)
    page = environment.get_template("template.html").render(page_context(run, drawn, notes, viewer))
    path = run_dir / "report.html"
    write_lines(path, [page])
    return path


# ---------------------------------------------------------------------------------------------------------- reading


def read_run(run_dir: Path) -> RunRecord:
    """Read what a run folder holds; the notes name what it does not."""
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such run folder")
    notes: list[str] = []
    sft, rl = (_read_phase(run_dir / phase / "metrics.jsonl", notes) for phase in ("sft", "rl"))
    evaluations = _read_evaluations(run_dir / "eval")
    if not (sft or rl or evaluations):
        raise ValueError(
            f"{run_dir}: nothing to report; expected sft/metrics.jsonl, rl/metrics.jsonl or eval/<split>/<model>.json"
        )
    config = _read_config(run_dir / "config.toml", notes)
    split = "test" if "test" in evaluations else min(evaluations, default=None)
    lists = {}
    for summary in evaluations.get(split or "", []):
        path = run_dir / "eval" / str(split) / f"{summary['name']}.lists.jsonl"
        if path.is_file():
            lists[summary["name"]] = read_lists(path)
        elif summary["name"] in STAGES:
            notes.append(f"eval/{split}/{path.name} is missing, so its lists are not shown or compared.")
    notes += _progress_notes(config, sft, rl, evaluations, split)
    notes += _trouble_notes(run_dir)
    curves = RunCurves(sft, rl, evaluations, split)
    return RunRecord(run_dir.resolve().name, curves, lists, config, _read_meta(run_dir / "meta.json", notes), notes)


def read_curves(path: Path) -> tuple[Curves, list[str]]:
    """Curves by metric key, and what was skipped; errors as `tracker.read_metrics`.

    Rows of the same step are merged, the later row winning. Text values are no curves and left out, null is NaN.
    """
    rows, cut_short = read_metrics(path)
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and (value is None or isinstance(value, int | float)):
                points.setdefault(key, {})[row["step"]] = math.nan if value is None else float(value)
    curves = {}
    for key, by_step in points.items():
        steps = sorted(by_step)
        curves[key] = (np.array(steps), np.array([by_step[step] for step in steps]))
    return curves, [cut_short] if cut_short else []


def _read_phase(path: Path, notes: list[str]) -> Curves:
    if not path.is_file():
        return {}
    curves, skipped = read_curves(path)
    notes += skipped
    return curves


def _read_evaluations(folder: Path) -> dict[str, list[dict]]:
    """split -> summaries, the stages of training first, then the baselines, then the rest by name."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*/*.json")):
        found.setdefault(path.parent.name, []).append(read_evaluation(path))
    place = {name: index for index, name in enumerate(MODEL_ORDER)}
    return {
        split: sorted(summaries, key=lambda summary: (place.get(summary["name"], len(place)), summary["name"]))
        for split, summaries in found.items()
    }


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("config.toml is missing, so the settings are not shown.")
        return {}
    return read_toml(path)


def _read_meta(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("meta.json is missing, so versions and machine are not shown.")
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return meta


def _progress_notes(config: dict, sft: Curves, rl: Curves, evaluations: dict, split: str | None) -> list[str]:
    notes = []
    warm_start = config.get("sft", {}).get("enabled", True)
    phases = [("sft", "SFT", sft)] if warm_start else []
    for section, label, curves in (*phases, ("rl", "RL", rl)):
        planned = config.get(section, {}).get("num_steps")
        done = last_step(curves)
        if not curves:
            notes.append(f"{label} has logged nothing yet ({section}/metrics.jsonl is missing or empty).")
        elif planned is not None and done < planned:
            notes.append(f"{label} is at step {done} of {planned}.")
    if split is None:
        notes.append("There is no evaluation yet (eval/ is missing or empty).")
    else:
        names = {summary["name"] for summary in evaluations[split]}
        expected = [name for name in MODEL_ORDER if warm_start or name != "sft"]
        missing = [model_label(name) for name in expected if name not in names]
        if missing:
            notes.append(f"Not evaluated on the {split} split: {', '.join(missing)}.")
    return notes


def _trouble_notes(run_dir: Path) -> list[str]:
    """What was cut, and the signs that the run learned nothing or came apart."""
    notes, lengths = [], run_dir / LENGTHS_FILE
    if lengths.is_file():
        notes += [f"{line}." for line in json.loads(lengths.read_text(encoding="utf-8"))["cut"]]
    config, metrics = run_dir / "config.toml", run_dir / "rl" / "metrics.jsonl"
    if config.is_file() and metrics.is_file():
        troubles = find_troubles(read_metrics(metrics)[0], load_config(config, saved=True))
        notes += [f"Warning: {trouble}." for trouble in troubles]
    return notes


def _left_out_notes(run: RunRecord, left_out: list[str]) -> list[str]:
    if not run.curves.rl:
        left_out = [text for text in left_out if "rl/metrics.jsonl" not in text or "sft/" in text]
    return [f"Figures left out: {'; '.join(left_out)}."] if left_out else []
