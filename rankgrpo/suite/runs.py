"""From a suite to runs: their folders, their commands, and which of them are missing.

A run belongs to a row, a model and a seed, and is one `rankgrpo run` command in a folder of its own; what it is worth
is in that folder once it is done. Nothing is run here.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from rankgrpo.config import Config, EvalConfig
from rankgrpo.config_file import changed_keys, load_config
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.compare import BASELINES, evaluation_path
from rankgrpo.evaluation.diversity import diversity_path
from rankgrpo.model.presets import resolve_model
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.suite.spec import NO_START, STAGES, Row, Suite, row_config


@dataclass(frozen=True)
class PlannedRun:
    """One row of a suite with one model and one seed."""

    row: Row
    model: str
    seed: int
    data: str
    folder: Path
    config: Config
    start: PlannedRun | None = None
    """The run whose warm start it continues, or whose model it scores."""
    from_model: str | None = None
    """Model given in place of a warm start that is trained here."""

    @property
    def title(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def stage(self) -> str:
        """Name under which its model is evaluated."""
        return "rank-grpo" if self.row.stage == "rl" else "sft"

    @property
    def source(self) -> str | None:
        """Model that the run takes in place of a warm start of its own."""
        return self.from_model if self.start is None else self.start.trained_model

    @property
    def command(self) -> list[str]:
        """What follows `rankgrpo` on the command line."""
        arguments = ["run", "--model", self.model, "--data", self.data, "--run-dir", str(self.folder)]
        arguments += ["--method", self.row.method] if self.row.method else []
        arguments += ["--from-model", self.source] if self.source else []
        arguments += ["--until", "sft"] if self.row.stage != "rl" else []  # a model that is given is scored, no more
        return [*arguments, "--set", *self.row.overrides_for(self.model), f"seed={self.seed}"]

    @property
    def shell_command(self) -> str:
        return shlex.join(["rankgrpo", *self.command])

    @property
    def trained_model(self) -> str:
        """The model that this run makes, or that was given in its place."""
        return self.from_model or str(self.folder / ("rl/best" if self.row.stage == "rl" else "sft/final"))

    def evaluation(self, name: str | None = None) -> Path:
        return evaluation_path(self.folder, self.config.eval.split, name or self.stage)

    def diversity(self, name: str | None = None) -> Path:
        return diversity_path(self.folder, self.config.eval.split, name or self.stage)

    @property
    def is_done(self) -> bool:
        return self.evaluation().is_file() and (self.config.eval.lists == 1 or self.diversity().is_file())


def plan_runs(suite: Suite, data: str, runs_dir: Path, *, sft: str | None = None) -> list[PlannedRun]:
    """All runs of the suite in the order they are run: seed by seed, each seed in the order of the rows.

    sft: model that stands in for the first warm start. Raises ModelError for an unknown model, and ConfigError for a
    folder of `runs_dir` that holds a run of another configuration.
    """
    for model in suite.models:
        resolve_model(model)
    first_sft = next((row.name for row in suite.rows if row.stage == "sft"), None)
    if sft is not None:
        resolve_model(sft)
        if first_sft is None:
            raise ConfigError(f'suite {suite.name} has no row with stage = "sft" that {sft} could stand for')
    runs: dict[tuple[str, str, int], PlannedRun] = {}
    for model in suite.models:
        for row in sorted(suite.rows, key=lambda row: STAGES.index(row.stage)):
            for seed in row.seeds:
                start = None if row.start == NO_START else suite.row(row.start)
                start_seed = seed if row.stage == "eval" else start and start.seeds[0]
                runs[model, row.name, seed] = PlannedRun(
                    row, model, seed, data,
                    folder=runs_dir / Path(model).name / f"{row.name}-seed{seed}",
                    config=row_config(row, model, data, seed),
                    start=start and runs[model, start.name, start_seed],
                    from_model=sft if row.name == first_sft else None,
                )  # fmt: skip
    order = {row.name: place for place, row in enumerate(suite.rows)}

    def place(run: PlannedRun) -> tuple[int, int, int]:
        return run.row.seeds.index(run.seed), STAGES.index(run.row.stage), order[run.row.name]

    planned = sorted(runs.values(), key=place)
    for run in planned:
        check_folder(run)
    return planned


def choose_runs(suite: Suite, runs: list[PlannedRun], only: list[str], num_seeds: int | None) -> list[PlannedRun]:
    """The runs of the rows `only` (default: all) with so many of their seeds, and the runs that those start from.

    Raises ConfigError for an unknown row, and for less than one seed.
    """
    if num_seeds is not None and num_seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {num_seeds}")
    names = [suite.row(name).name for name in only] or suite.row_names
    chosen = [run for run in runs if run.row.name in names and run.seed in run.row.seeds[:num_seeds]]
    for run in chosen:  # it grows while it is read: what is scored may itself have a start
        if run.start is not None and run.start not in chosen:
            chosen.append(run.start)
    return [run for run in runs if run in chosen]


def check_folder(run: PlannedRun) -> None:
    """Raise ConfigError when the run's folder holds a run of another configuration, or from another model."""
    saved = run.folder / "config.toml"
    if not saved.is_file():
        return
    by_epochs = {f"{part}.num_steps" for part in ("sft", "rl") if getattr(run.config, part).num_steps == 0}
    changed = changed_keys(load_config(saved, saved=True), run.config)
    changed = [text for text in changed if text.split(":")[0] not in by_epochs]
    old = _saved_source(run)
    if old and run.source and Path(old).resolve() != Path(run.source).resolve():
        changed.append(f"--from-model: {old} -> {run.source}")
    if changed:
        raise ConfigError(
            f"{run.folder} holds a run of another configuration ({'; '.join(changed)}). Remove that folder to run the "
            f"row again, or keep both: name another folder of runs with --runs-dir"
        )


def _saved_source(run: PlannedRun) -> str | None:
    """The model that the run in the folder was started from."""
    machine = machine_of(run)
    if "from_model" in machine:
        return machine["from_model"]
    started = run.folder / "rl" / "start.json"
    return json.loads(started.read_text(encoding="utf-8"))["from_model"] if started.is_file() else None


def share_evaluations(run: PlannedRun) -> None:
    """Link the scores of the warm start and of the baselines into `run`, so that they are not computed again.

    Those of the warm start where they are of lists like the run's: scored alike, and held to the same or to nothing.
    """
    if run.start is None:
        return
    with_start = run.row.stage == "rl" and _scoring(run) == _scoring(run.start)
    for name in (*(["sft"] if with_start else []), *BASELINES):
        for path in (run.start.evaluation(name), run.start.diversity(name)):
            for file in path.parent.glob(f"{name}.*"):
                link = run.folder / file.relative_to(run.start.folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.unlink(missing_ok=True)
                    link.symlink_to(os.path.relpath(file, link.parent))


def _scoring(run: PlannedRun) -> tuple[EvalConfig, str, str]:
    """What decides which lists of a model are scored, and how."""
    config = run.config
    return replace(config.eval, constrain="run"), config.shown_constrain, config.rl.forbid


def steps_done(run: PlannedRun) -> int:
    """Optimizer steps done in the stage that the run trains."""
    metrics = run.folder / ("sft" if run.row.stage == "sft" else "rl") / "metrics.jsonl"
    rows = read_metrics(metrics)[0] if metrics.is_file() else []
    return rows[-1]["step"] if rows else 0


def machine_of(run: PlannedRun) -> dict:
    """meta.json of the run's folder; {} without one."""
    path = run.folder / "meta.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
