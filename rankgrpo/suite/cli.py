"""`rankgrpo experiments`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from rankgrpo.files.options import Overrides, check_least


def experiments(
    suite: Positional[Annotated[str, arg(help="suite of experiments/suites, or a path to a .toml")]] = "cpu",
    *,
    data: Annotated[str | None, arg(help="data set (default: the suite's)")] = None,
    only: Annotated[list[str], arg(help="rows to run, with the warm starts they need (default: all)")] = [],  # noqa: B006
    seeds: Annotated[int | None, arg(help="run so many seeds of every row (default: all)")] = None,
    sft: Annotated[str | None, arg(help="model in place of the suite's warm start, for example RUN/sft/final")] = None,
    jobs: Annotated[int, arg(help="runs at once; 0 is one on GPUs, else two")] = 0,
    nproc: Annotated[int, arg(help="processes of a run; 0 is one a GPU, else one")] = 0,
    max_minutes: Annotated[float | None, arg(help="stop in time; the same command goes on later")] = None,
    runs_dir: Annotated[Path | None, arg(help="folder of the runs (default: runs/suites/SUITE-DATA)")] = None,
    out: Annotated[Path | None, arg(help="folder of the page and the results (default: experiments)")] = None,
    page: Annotated[bool, arg(help="run nothing: only the tables and plots, from what there is")] = False,
    plan: Annotated[bool, arg(help="run nothing: list the runs, what is missing and the command of each")] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run what is missing of a suite of experiments and rebuild its tables and plots. Interrupt it at any time.

    Try:
      rankgrpo experiments cpu --data path/to/redial --max-minutes 30
      rankgrpo experiments cpu --data path/to/redial --only rank-grpo --seeds 1
      rankgrpo experiments cpu --plan
    """
    from rankgrpo.suite.command import list_suite, open_suite, rebuild_page, run_suite

    check_least(0, jobs=jobs, nproc=nproc, max_minutes=max_minutes)
    opened = open_suite(suite, data=data, sft=sft, runs_dir=runs_dir, out=out, overrides=overrides)
    if plan:
        print(list_suite(opened, only, seeds))
    elif page:
        print(rebuild_page(opened))
    else:
        run_suite(opened, only, seeds, num_jobs=jobs, num_processes=nproc, max_minutes=max_minutes)
