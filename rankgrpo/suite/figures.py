"""The figures of a suite: one function a figure, from one model's board of results.

Rows of one group share a panel; the rows that everything is compared with stand in every panel, dashed and grey.
Colours are the Okabe-Ito set, and every line also has a marker or a dash pattern of its own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from rankgrpo.evaluation.tables import main_metric, model_label
from rankgrpo.report.figures import GREY, RANK_COLOURS, SHOWN_RANKS, smooth
from rankgrpo.report.plots import STYLE
from rankgrpo.suite.spec import OWN_START

Board = dict[str, Any]
Result = dict[str, Any]

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MAX_COLUMNS = 3
WIDTH, HEIGHT, LEGEND = 4.2, 3.0, 0.9  # inches of a panel, and of a legend below it


@dataclass(frozen=True)
class SuiteFigure:
    name: str
    """File name without ending."""
    title: str
    caption: str
    draw: Callable[[Board, Sequence[str]], Figure | None]
    """Draws the figure from the board and the names of the rows that all are compared with."""


def draw_figures(board: Board, against: Sequence[str], folder: Path, prefix: str) -> list[tuple[SuiteFigure, Path]]:
    """Write `folder/<prefix><name>.png` for every figure there are data for, and remove the others."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for figure in FIGURES:
        path = folder / f"{prefix}{figure.name}.png"
        with matplotlib.rc_context(STYLE):
            picture = figure.draw(board, against)
            if picture is None:
                path.unlink(missing_ok=True)
                continue
            _save(picture, path)
        drawn.append((figure, path))
    return drawn


def _save(picture: Figure, path: Path) -> None:
    """A PNG with a palette: a third of the size, and the same bytes for the same data."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=110, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(colors=256, dither=Image.Dither.NONE).save(path, optimize=True)


# ---------------------------------------------------------------------------------------------------------- panels


def trained_rows(board: Board) -> list[Result]:
    """Rows of reinforcement learning with a group, in the suite's order; those without one stand in tables only."""
    return [row for row in board["rows"] if row.get("group") and row["recipe"]["stage"] == "rl"]


def find_row(board: Board, name: str) -> Result | None:
    return next((row for row in board["rows"] if row["name"] == name), None)


def base_of(board: Board, row: Result, name: str) -> Result | None:
    """The row that `row` is compared with under this name of `against`: for "start" the warm start it came from."""
    return find_row(board, row["recipe"]["start"] if name == OWN_START else name)


def base_label(board: Board, name: str) -> str:
    row = find_row(board, name)
    return row["label"] if row else "its warm start"


def groups_of(rows: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return groups


def _grid(num_panels: int, height: float, **kwargs) -> tuple[Figure, list[Axes]]:
    columns = min(num_panels, MAX_COLUMNS)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(max(WIDTH * columns, 6.0), height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)
    for extra in panels[num_panels:]:
        extra.remove()
    return figure, panels[:num_panels]


def _by_group(
    board: Board,
    against: Sequence[str],
    xlabel: str,
    ylabel: str,
    read: Callable[[Result], tuple[Sequence[float], Sequence[float]] | None],
) -> Figure | None:
    """One panel a group with one line a row, as `read` gives it."""
    rows = [row for row in trained_rows(board) if read(row) is not None]
    if not rows:
        return None
    groups = groups_of(rows)
    common = [row for name in against if (row := find_row(board, name)) is not None and read(row) is not None]
    figure, panels = _grid(len(groups), HEIGHT + LEGEND, sharex=True, sharey=True)
    for place, (axes, (group, members)) in enumerate(zip(panels, groups.items(), strict=True)):
        for index, row in enumerate(row for row in common if row not in members):
            axes.plot(*read(row), linestyle=DASHES[index + 1], color=GREY, label=row["label"])
        for index, row in enumerate(members):
            axes.plot(
                *read(row),
                linestyle=DASHES[index % 6], color=COLOURS[index % 6], marker=MARKERS[index % 6], markersize=4,
                linewidth=1.7, label=row["label"],
            )  # fmt: skip
        axes.set_title(group, fontsize=11)
        axes.set_xlabel(xlabel)
        if place % MAX_COLUMNS == 0:
            axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.tick_params(labelbottom=True)
        axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


def _curve(row: Result, key: str) -> tuple[list[float], list[float]] | None:
    if key not in row.get("curves", {}):
        return None
    steps, values = row["curves"][key]
    return steps, [np.nan if value is None else value for value in values]


def _percent(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:+.3g} %"))


# ---------------------------------------------------------------------------------------------------------- figures


def gains(board: Board, against: Sequence[str]) -> Figure | None:
    """Relative gain of NDCG over the first row that all are compared with, a point a row."""
    shown = []
    for row in trained_rows(board):
        gain = row["gain"].get(against[0]) if against else None
        relative = gain and gain[main_metric(gain)]["relative"]
        if relative and None not in relative.values():
            shown.append((row, relative))
    if not shown:
        return None
    figure = Figure(figsize=(7.0, 1.1 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, (row, relative) in enumerate(shown):
        errors = [[relative["mean"] - relative["low"]], [relative["high"] - relative["mean"]]]
        axes.errorbar(relative["mean"], place, xerr=errors, color=COLOURS[1], marker="o", capsize=3, linewidth=1.6)
        seeds = _gains_by_seed(row, base_of(board, row, against[0]))
        if len(seeds) > 1:
            axes.plot(seeds, [place] * len(seeds), "|", color=COLOURS[0], markersize=9)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(shown)), [row["label"] for row, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{_metric(board)} over {base_label(board, against[0])}, 95 % interval")
    _percent(axes)
    return figure


def _gains_by_seed(row: Result, base: Result) -> list[float]:
    key = main_metric(row["metrics"])
    mean = base["metrics"][key]["mean"]
    return [scores[key] / mean - 1 for scores in row["by_seed"].values()] if mean else []


def _metric(board: Board) -> str:
    return f"NDCG@{board['num_ranks']}"


def warm_starts(board: Board, against: Sequence[str]) -> Figure | None:
    """NDCG of every warm start and of what is trained from it, a line a group; nothing where all share one."""
    key = main_metric(board["rows"][0]["metrics"]) if board["rows"] else ""
    rows = trained_rows(board)
    starts = [row for row in board["rows"] if any(row["name"] == other["recipe"]["start"] for other in rows)]
    if len(starts) < 2:
        return None
    places = {row["name"]: place for place, row in enumerate(starts)}
    lines = [("Warm start", [(place, row) for place, row in enumerate(starts)])]
    for group, members in groups_of(rows).items():
        found = [(places[row["recipe"]["start"]], row) for row in members if row["recipe"]["start"] in places]
        lines.append((group, sorted(found, key=lambda point: point[0])))
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (label, points) in enumerate(lines):
        scores = [row["metrics"][key] for _, row in points]
        means = np.array([score["mean"] for score in scores])
        errors = np.abs(np.array([[score["low"], score["high"]] for score in scores]).T - means)
        axes.errorbar(
            [place + 0.05 * index for place, _ in points], means, yerr=errors, label=label, capsize=3,
            color=COLOURS[index % 6], marker=MARKERS[index % 6], linestyle=DASHES[index % 6],
        )  # fmt: skip
    for name, dash in (("popularity", "--"), ("ease", ":")):
        if (row := find_row(board, name)) is not None:
            axes.axhline(row["metrics"][key]["mean"], color=GREY, linestyle=dash, label=model_label(name))
    axes.set_xticks(range(len(starts)), [row["label"] for row in starts])
    axes.set_ylabel(_metric(board))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def learning_curves(board: Board, against: Sequence[str]) -> Figure | None:
    key = f"eval/ndcg@{board['num_ranks']}"
    return _by_group(
        board, _rl_only(board, against), "Step", f"Validation {_metric(board)}", lambda row: _curve(row, key)
    )


def _rl_only(board: Board, names: Sequence[str]) -> list[str]:
    """The names without warm starts, whose curves have other steps on their axis."""
    return [row["name"] for row in trained_rows(board) if row["name"] in names]


def hit_rate_by_rank(board: Board, against: Sequence[str]) -> Figure | None:
    def read(row: Result):
        rates = row["hit_rate_by_rank"]
        return range(1, len(rates) + 1), [100 * rate for rate in rates]

    figure = _by_group(board, against, "Rank (1 = top)", "Lists with a hit there (%)", read)
    return _rank_ticks(figure, board["num_ranks"])


def gain_by_rank(board: Board, against: Sequence[str]) -> Figure | None:
    """Hits down to a rank, less those of the first row that all are compared with."""
    if not against:
        return None

    def read(row: Result):
        if (base := base_of(board, row, against[0])) is None:
            return None
        gained = np.cumsum(row["hit_rate_by_rank"]) - np.cumsum(base["hit_rate_by_rank"])
        return range(1, len(gained) + 1), gained

    figure = _by_group(board, against, "Down to rank", f"Hits a list over {base_label(board, against[0])}", read)
    return _rank_ticks(figure, board["num_ranks"])


def _rank_ticks(figure: Figure | None, num_ranks: int) -> Figure | None:
    for axes in figure.axes if figure is not None else ():
        axes.xaxis.set_major_locator(FixedLocator([1, *range(5, num_ranks + 1, 5)]))
    return figure


def reward_by_rank(board: Board, against: Sequence[str]) -> Figure | None:
    rows = [row for row in trained_rows(board) if "reward_by_rank" in row["curves"]]
    if not rows:
        return None
    figure, panels = _grid(len(rows), HEIGHT, sharex=True)
    for place, (axes, row) in enumerate(zip(panels, rows, strict=True)):
        steps, matrix_KS = row["curves"]["reward_by_rank"]
        for rank, colour, dash in zip(SHOWN_RANKS, RANK_COLOURS, DASHES, strict=False):
            if rank < len(matrix_KS):
                values = np.array([np.nan if value is None else value for value in matrix_KS[rank]])
                axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
                line = smooth(values, len(values) // 5 | 1)
                axes.plot(steps, line, linestyle=dash, color=colour, label=f"rank {rank + 1}")
        axes.set_title(row["label"], fontsize=11)
        axes.set_xlabel("Step")
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_ylim(bottom=0)
        if place % MAX_COLUMNS == 0:
            axes.set_ylabel("Reward of a sampled item")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def union_recall(board: Board, against: Sequence[str]) -> Figure | None:
    label = f"Recall@{board['num_ranks']} of the union"
    return _union_ticks(_by_group(board, against, "Lists a conversation", label, lambda row: _union(board, row)), board)


def union_gain(board: Board, against: Sequence[str]) -> Figure | None:
    """Recall of the union of lists, less that of the first row that all are compared with."""
    if not against:
        return None

    def read(row: Result):
        base = base_of(board, row, against[0])
        before, union = _union(board, base) if base else None, _union(board, row)
        return before and union and (union[0], np.subtract(union[1], before[1]))

    label = f"Recall@{board['num_ranks']} over {base_label(board, against[0])}"
    return _union_ticks(_by_group(board, against, "Lists a conversation", label, read), board)


def _union(board: Board, row: Result) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Sizes of the union and its Recall at each; None where fewer than two are known."""
    prefix = f"recall@{board['num_ranks']}_of_"
    union = row.get("union", {})
    points = [(int(key.removeprefix(prefix)), union[key]["mean"]) for key in union if key.startswith(prefix)]
    return tuple(zip(*points, strict=True)) if len(points) > 1 else None


def _union_ticks(figure: Figure | None, board: Board) -> Figure | None:
    if figure is not None:
        sizes = max((union[0] for row in board["rows"] if (union := _union(board, row))), key=len)
        figure.axes[0].set_xscale("log", base=2)
        for axes in figure.axes:
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    return figure


def health(board: Board, against: Sequence[str]) -> Figure | None:
    shown = {
        "list/hits_mean": "Hits a sampled list",
        "list/duplicate_frac": "Repeated lines (share)",
        "policy/entropy": "Entropy (nats a token)",
        "reward/zero_std_frac": "Cells without gradient (share)",
    }
    groups = groups_of(row for row in trained_rows(board) if row["curves"])
    if not groups:
        return None
    figure = Figure(figsize=(3.6 * len(shown), 2.9 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), len(shown), squeeze=False, sharex=True, sharey="col")
    for panels, (group, members) in zip(grid, groups.items(), strict=True):
        for axes, (key, label) in zip(panels, shown.items(), strict=True):
            for index, row in enumerate(members):
                if (curve := _curve(row, key)) is not None:
                    line = smooth(np.array(curve[1]), len(curve[1]) // 10 | 1)
                    axes.plot(curve[0], line, linestyle=DASHES[index % 6], color=COLOURS[index % 6], label=row["label"])
            axes.set_title(label, fontsize=10)
            axes.tick_params(labelbottom=True)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        panels[0].set_ylabel(group)
        panels[0].legend(fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("Step")
    return figure


FIGURES = (
    SuiteFigure(
        "gains",
        "Over the warm start",
        "NDCG on the same test conversations, with paired 95 % intervals over them; red strokes are single seeds.",
        gains,
    ),
    SuiteFigure(
        "warm_starts",
        "From each warm start",
        "NDCG of the test conversations with 95 % intervals: every warm start, and what is trained from it.",
        warm_starts,
    ),
    SuiteFigure(
        "learning_curves",
        "Learning curves",
        "NDCG on the validation split, mean over seeds. The table names the step that was kept and tested.",
        learning_curves,
    ),
    SuiteFigure("hit_rate_by_rank", "Hits by rank", "How often each rank of a test list is a hit.", hit_rate_by_rank),
    SuiteFigure(
        "gain_by_rank",
        "Where in the list a method gains",
        "Hits of a test list from the top down to each rank, less those of the warm start.",
        gain_by_rank,
    ),
    SuiteFigure(
        "reward_by_rank",
        "Reward by rank over time",
        "Of the lists sampled in training (the paper's Figures 2 and 3). With log and exp_gamma a rank also earns what "
        "comes after it; elsewhere the reward is whether the item is a hit.",
        reward_by_rank,
    ),
    SuiteFigure("union_recall", "Many lists", "Recall of the union of n lists: pass@n for lists.", union_recall),
    SuiteFigure("union_gain", "Many lists, over the warm start", "Less what the warm start finds.", union_gain),
    SuiteFigure(
        "health",
        "Sampled lists during training",
        "A cell is a prompt and a rank, for token and list units a prompt; without a difference in reward among its "
        "lists it has no gradient.",
        health,
    ),
)
