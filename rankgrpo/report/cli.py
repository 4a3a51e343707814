"""`rankgrpo report` and `rankgrpo show`: their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

Run = Positional[Annotated[Path, arg(help="run folder")]]


def report(run: Run = Path("runs/tiny-demo")) -> None:
    """Rebuild report.html and the plots of a run folder, complete or not.

    Try:
      rankgrpo report runs/tiny-demo
    """
    from rankgrpo.report.build import build_report

    print(build_report(run))


def show(
    run: Run = Path("runs/tiny-demo"),
    *,
    step: Annotated[int | None, arg(help="training step (default: the last that was kept)")] = None,
    group: Annotated[int, arg(help="which of the step's groups, from 1")] = 1,
    id: Annotated[str | None, arg(help="conversation, in place of --group; its last group without --step")] = None,
    by: Annotated[
        Literal["reward", "advantage", "ratio", "logp"], arg(help="number and colour of a line; colours on a terminal")
    ] = "reward",
) -> None:
    """Print the lists that were sampled for one conversation in training, side by side.

    Try:
      rankgrpo show runs/tiny-demo
      rankgrpo show runs/tiny-demo --step 1 --group 2 --by advantage
    """
    from rankgrpo.report.terminal import show

    print(show(run, step, group, id, by))
