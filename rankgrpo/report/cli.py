"""`rankgrpo report`, `rankgrpo show` and `rankgrpo export`: their options."""

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


def export(
    run: Positional[Annotated[Path, arg(help="run folder")]],
    out: Positional[Annotated[Path, arg(help="folder to write; must not exist")]],
    *,
    which: Annotated[
        Literal["best", "final", "sft"], arg(help="the best model by validation, the last, or the warm start")
    ] = "best",
    push: Annotated[
        str | None, arg(metavar="OWNER/NAME", help="also upload the folder to the Hugging Face hub, private when new")
    ] = None,
) -> None:
    """Write a run's model as a folder to serve or to publish: model card, catalog, settings of the trie, a request.

    Try:
      rankgrpo export runs/tiny-demo served

    docs/serving.md says how vLLM serves it.
    """
    from rankgrpo.report.export import check_name, export_run, upload

    if push is not None:
        check_name(push)
    print(export_run(run, out, which=which))
    if push is not None:
        print(upload(out, push))
