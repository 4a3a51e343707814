"""`rankgrpo experiments`: open a suite, run what is missing, write its results, rebuild the page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from rankgrpo.errors import ConfigError
from rankgrpo.suite.page import build_page
from rankgrpo.suite.results import collect_results, read_results, write_results
from rankgrpo.suite.runner import run_missing
from rankgrpo.suite.runs import PlannedRun, choose_runs, plan_runs
from rankgrpo.suite.spec import Suite, read_suite, suite_path


@dataclass(frozen=True)
class OpenSuite:
    suite: Suite
    data_name: str
    runs: list[PlannedRun]
    out: Path

    @property
    def results_path(self) -> Path:
        return self.out / "results" / f"{self.suite.name}-{self.data_name}" / "results.json"


def open_suite(
    name: str,
    *,
    data: str | None = None,
    sft: str | None = None,
    runs_dir: Path | None = None,
    out: Path | None = None,
    overrides: list[str] | None = None,
) -> OpenSuite:
    """Read a suite and plan its runs. Raises ConfigError for whatever cannot be run, before anything runs."""
    suite = read_suite(suite_path(name), overrides=overrides)
    data = data or suite.data
    if data != "demo" and not Path(data).is_dir():
        raise ConfigError(f"{data}: no such folder; --data takes a data set (`rankgrpo data check`), or demo")
    data_name = Path(data).resolve().name
    runs_dir = runs_dir or Path("runs") / "suites" / f"{suite.name}-{data_name}"
    return OpenSuite(suite, data_name, plan_runs(suite, data, runs_dir, sft=sft), out or Path("experiments"))


def run_suite(
    opened: OpenSuite,
    only: list[str],
    num_seeds: int | None,
    *,
    num_jobs: int = 0,
    num_processes: int = 0,
    max_minutes: float | None = None,
) -> None:
    """Run what is missing and rebuild the page. Raises ConfigError at the end when runs failed."""
    num_gpus = torch.cuda.device_count()
    outcome = run_missing(
        choose_runs(opened.suite, opened.runs, only, num_seeds),
        num_jobs=num_jobs or (1 if num_gpus else min(2, os.cpu_count() or 1)),
        num_processes=num_processes or num_gpus or 1,
        max_minutes=max_minutes,
    )
    print(rebuild_page(opened))
    if outcome.failed:
        failures = "\n".join(f"  {title}: {why}" for title, why in outcome.failed.items())
        raise ConfigError(f"{len(outcome.failed)} runs failed; the same command tries them again.\n{failures}")
    if outcome.stopped:
        print(f"stopped after {max_minutes:g} minutes; the same command goes on")


def rebuild_page(opened: OpenSuite) -> Path:
    """Write results.json from the complete runs, then the page and the figures of all results; returns the page."""
    path = opened.results_path
    earlier = read_results(path) if path.is_file() else None
    results = collect_results(opened.suite, opened.runs, opened.data_name, earlier)
    if any(board["rows"] for board in results["boards"].values()):
        write_results(path, results)
    return build_page(opened.out)


def list_suite(opened: OpenSuite, only: list[str], num_seeds: int | None) -> str:
    """Every run with its state and its command, and what is left."""
    runs = choose_runs(opened.suite, opened.runs, only, num_seeds)
    lines = [f"{'finished' if run.is_done else 'missing ':8}  {run.shell_command}" for run in runs]
    return "\n".join([*lines, f"{sum(not run.is_done for run in runs)} of {len(runs)} runs are missing"])
