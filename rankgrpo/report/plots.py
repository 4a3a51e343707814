"""Which figures stand in a run report, what is said about them, and their files.

Every figure is written as a PNG and returned as SVG for a light and a dark page. The drawing itself is in
`figures.py`.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from rankgrpo.report import figures as figures
from rankgrpo.report.figures import BLUE, GREEN, GREY, GRID, ORANGE, PURPLE, RANK_COLOURS, SKY, TEXT, RunCurves

DARK = {
    TEXT: "#e6edf3", GRID: "#3a424c", GREY: "#9aa4af",
    BLUE: "#58a6e8", ORANGE: "#f08a4b", GREEN: "#2fc79a", PURPLE: "#db91c0", SKY: "#9ad4f5",
    **dict(zip(RANK_COLOURS, ("#fde725", "#5ec962", "#3fa7b5", "#9a7fd1"), strict=True)),
}  # fmt: skip
STYLE = {
    "svg.hashsalt": "rankgrpo",  # same data, same bytes
    "svg.fonttype": "path",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    **{key: TEXT for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")},
}


@dataclass(frozen=True)
class Plot:
    name: str
    """File name without ending."""
    title: str
    caption: str
    section: str
    needs: str
    """What the run must have logged, for the list of what is missing."""
    draw: Callable[[RunCurves], Figure | None]


@dataclass(frozen=True)
class DrawnPlot:
    plot: Plot
    light_uri: str
    dark_uri: str


PLOTS = (
    Plot(
        "validation_ndcg", "NDCG by step",
        "Quality of validation lists (eval.temperature), first while the model imitates the teacher's lists (SFT), "
        "then while it learns from its own hits (RL). Both panels share one vertical axis.",
        "learning", "eval/ndcg@k in sft/metrics.jsonl or rl/metrics.jsonl", figures.validation_ndcg,
    ),
    Plot(
        "hit_rate_by_rank", "Hit rate by rank",
        "How often the item at each rank is one the user went on to like. A good list falls from left to right: "
        "the best guesses come first.",
        "learning", "an evaluation in eval/", figures.hit_rate_by_rank,
    ),
    Plot(
        "reward_heatmap", "Reward by rank and step",
        "Each column is a step, each row a place in the sampled lists. Brighter means more reward.",
        "learning", "reward/rank_00 ... in rl/metrics.jsonl", figures.reward_heatmap,
    ),
    Plot(
        "reward_by_rank", "Reward at four ranks",
        "The same for ranks 1, 5, 10 and 20: a faint line for every step, a thick one for the moving mean.",
        "learning", "reward/rank_00 ... in rl/metrics.jsonl", figures.reward_lines,
    ),
    Plot(
        "lists_with_a_hit", "Lists with a hit",
        "Share of the lists sampled in training that hold at least one item the user liked. They are drawn "
        "at rl.temperature, so they are worse than lists that are decoded greedily.",
        "learning", "list/hit_frac in rl/metrics.jsonl", figures.lists_with_a_hit,
    ),
    Plot(
        "sft_loss", "Loss of the warm start",
        "Mean negative log-likelihood of the teacher's lists. Validation rising while training falls is overfitting.",
        "learning", "loss/nll in sft/metrics.jsonl", figures.sft_loss,
    ),
    Plot(
        "zero_variance", "Groups without a gradient",
        "Share of (prompt, rank) groups whose lists all earned the same reward, so that nothing is learned from them. "
        "High values are normal when hits are rare.",
        "health", "reward/zero_std_frac in rl/metrics.jsonl", figures.zero_variance,
    ),
    Plot(
        "zero_variance_heatmap", "Groups without a gradient, by rank",
        "The same for every rank: dark cells are where lists of a group differ in reward, and where the gradient is.",
        "health", "reward/zero_std_rank_00 ... in rl/metrics.jsonl", figures.zero_variance_heatmap,
    ),
    Plot(
        "kl", "Distance from the SFT model",
        "KL divergence (k3 estimate). A slow rise is learning; a jump is a policy running away.",
        "health", "loss/kl in rl/metrics.jsonl", figures.kl_to_reference,
    ),
    Plot(
        "entropy", "Entropy of the policy",
        "How undecided the model is about its next token. A fall towards zero means it no longer explores.",
        "health", "policy/entropy in rl/metrics.jsonl", figures.entropy,
    ),
    Plot(
        "clip", "Clipped ranks",
        "Share of ranks whose probability ratio left the clip band. Zero with one update a batch.",
        "health", "ratio/clip_low_frac in rl/metrics.jsonl", figures.clip_fractions,
    ),
    Plot(
        "grad_norm", "Gradient norm",
        "Before clipping. Spikes point to a batch or a learning rate worth a look.",
        "health", "grad/norm in rl/metrics.jsonl", figures.grad_norm,
    ),
    Plot(
        "list_quality", "Shape of the sampled lists",
        "Lines that read as Title (Year), lines that name a catalog item, lists that ended by themselves, and lines "
        "that repeat an earlier one.",
        "health", "list/parsed_frac in rl/metrics.jsonl", figures.list_quality,
    ),
    Plot(
        "list_length", "Length of the sampled lists",
        "Lines a list; the prompt asks for a fixed number.",
        "health", "list/items_mean in rl/metrics.jsonl", figures.list_length,
    ),
    Plot(
        "list_tokens", "Tokens of the sampled lists",
        "Length in tokens. Growth at a steady number of lines means longer titles, or text that is no list.",
        "health", "list/tokens_mean in rl/metrics.jsonl", figures.list_tokens,
    ),
    Plot(
        "mismatch", "Trainer against sampler",
        "How far the trainer's log-probability of a sampled token is from the sampler's. A large gap means that the "
        "two do not run the same model.",
        "health", "mismatch/abs_logp in rl/metrics.jsonl", figures.mismatch,
    ),
    Plot(
        "mismatch_ranks", "Ranks that the mismatch moves",
        "Share of the sampled ranks whose ratio, trainer to sampler, is outside the clip band before any update; and, "
        "with rl.mismatch_correction, of those it weighs less.",
        "health", "mismatch/outside_clip_frac in rl/metrics.jsonl", figures.mismatch_of_ranks,
    ),
    Plot(
        "seconds", "Seconds by phase",
        "Where an RL step spends its time.",
        "cost", "time/sample_s ... in rl/metrics.jsonl", figures.seconds_by_step,
    ),
    Plot(
        "tokens", "Tokens by phase",
        "Tokens sampled and tokens trained on since the first RL step.",
        "cost", "tokens/sampled in rl/metrics.jsonl", figures.tokens_by_step,
    ),
)  # fmt: skip


def draw_plots(run: RunCurves, folder: Path) -> tuple[list[DrawnPlot], list[Plot]]:
    """Writes `folder/<name>.png` for every figure the run has data for; returns (drawn, left out).

    The URIs hold SVG with the glyphs as paths: nothing is loaded from anywhere, and text is sharp at any size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn, left_out = [], []
    for plot in PLOTS:
        path = folder / f"{plot.name}.png"
        with matplotlib.rc_context(STYLE):
            figure = plot.draw(run)
            if figure is None:
                path.unlink(missing_ok=True)  # an older run's figure must not pass for this one's
                left_out.append(plot)
                continue
            svg = _svg(figure)
            figure.set_layout_engine("none")  # the layout stands; finding it again would take most of the time
            figure.savefig(path, dpi=160, facecolor="white")
        drawn.append(DrawnPlot(plot, _uri(svg), _uri(darken(svg))))
    return drawn, left_out


def darken(svg: str) -> str:
    """The same figure for a dark page: every colour exchanged for its partner in `DARK`."""
    return re.sub("|".join(DARK), lambda match: DARK[match[0]], svg)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")
