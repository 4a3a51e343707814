"""The figures of a run report: one function a figure.

A figure function takes the curves of a run and returns a matplotlib figure, or None when the run has not logged what
it shows. Colours are the Okabe-Ito set (safe for colour-blind readers) and never the only difference between two lines.
No pyplot, so no global state and no display.

Reads and writes no files: titles, captions and output are in `plots.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rankgrpo.evaluation.tables import MODEL_LABELS, model_label

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # metric key -> (steps, values), steps ascending

MAX_POINTS = 300  # a line of more points is averaged down to this many: the file stays small, the shape stays
SHOWN_RANKS = (0, 4, 9, 19)  # 0-based; shown to the reader as ranks 1, 5, 10 and 20

# Colours on a light page, as matplotlib writes them into an SVG; `plots.DARK` has their partners.
TEXT, GRID, GREY = "#1f2328", "#d8dee4", "#7a828b"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#b8609a", "#56b4e9"
RANK_COLOURS = ("#440154", "#31688e", "#35b779", "#c9a400")  # evenly apart in lightness
PHASE_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)
MODEL_COLOURS = {"before": GREY, "sft": BLUE, "rank-grpo": ORANGE, "ease": GREEN, "popularity": PURPLE}


@dataclass(frozen=True)
class RunCurves:
    """What the figures are drawn from."""

    sft: Curves = field(default_factory=dict)
    rl: Curves = field(default_factory=dict)
    evaluations: dict[str, list[dict]] = field(default_factory=dict)
    """split -> evaluation summaries, as `evaluate.read_evaluation` returns them."""
    headline_split: str | None = None


# ---------------------------------------------------------------------------------------------------------- helpers


def thin(steps: np.ndarray, values: np.ndarray, max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbouring points until at most `max_points` are left. NaN counts as absent."""
    if len(steps) <= max_points:
        return steps, values
    chunks = np.array_split(np.arange(len(steps)), max_points)
    means = [float(np.mean(present)) if (present := _finite(values[c])).size else np.nan for c in chunks]
    return np.array([steps[c].mean() for c in chunks]), np.array(means)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean over `window` points (odd; fewer at the ends); NaN is left out of it."""
    half = window // 2
    present = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(present, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(present)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _new_figure(num_panels: int = 1, **kwargs) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False, **kwargs)[0]
    return figure, list(panels)


def _line(axes: Axes, curve: tuple[np.ndarray, np.ndarray], colour: str, label: str, style: str = "-") -> None:
    """A thick smoothed line over the faint raw one."""
    steps, values = thin(*curve)
    window = len(steps) // 20 | 1
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, smooth(values, window), style, color=colour, linewidth=1.9, label=label, marker=marker)


def _finish(axes: Axes, ylabel: str, xlabel: str = "RL step", *, legend: bool = True, **legend_kwargs) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if legend:
        axes.legend(**legend_kwargs)


def _lines(curves: Curves, ylabel: str, wanted: list[tuple[str, str, str, str]]) -> Figure | None:
    """One panel; `wanted` holds (key, label, colour, line style)."""
    wanted = [line for line in wanted if line[0] in curves]
    if not wanted:
        return None
    figure, (axes,) = _new_figure()
    for key, label, colour, style in wanted:
        _line(axes, curves[key], colour, label, style)
    _finish(axes, ylabel, legend=len(wanted) > 1)
    return figure


def _rank_lines(prefix: str) -> list[tuple[str, str, str, str]]:
    styles = ("-", "--", "-.", ":")
    ranks = zip(SHOWN_RANKS, RANK_COLOURS, styles, strict=True)
    return [(f"{prefix}{rank:02d}", f"rank {rank + 1}", colour, style) for rank, colour, style in ranks]


def rank_keys(curves: Curves, prefix: str) -> list[str]:
    """The keys `prefix00`, `prefix01`, ... present, in rank order."""
    pattern = re.compile(re.escape(prefix) + r"\d+")
    return sorted((key for key in curves if pattern.fullmatch(key)), key=lambda key: int(key[len(prefix) :]))


def curve_matrix(
    curves: Curves, keys: list[str], *, absent: float = np.nan, max_columns: int = 160
) -> tuple[np.ndarray, np.ndarray]:
    """Values by key (rows) and step (columns), and the steps; columns are averaged down to `max_columns`.

    `absent` stands where a key was not logged at a step that another one was; NaN is left out of the averages.
    """
    steps = np.unique(np.concatenate([curves[key][0] for key in keys]))
    full = np.full((len(keys), len(steps)), absent)
    for row, key in enumerate(keys):
        full[row, np.searchsorted(steps, curves[key][0])] = curves[key][1]
    if len(steps) <= max_columns:
        return full, steps
    thinned = [thin(steps, values, max_columns) for values in full]
    return np.stack([values for _, values in thinned]), thinned[0][0]


def _rank_heatmap(curves: Curves, prefix: str, label: str, high: float | None = None) -> Figure | None:
    keys = rank_keys(curves, prefix)
    if not keys:
        return None
    matrix_KS, steps = curve_matrix(curves, keys)
    figure, (axes,) = _new_figure()
    pad = 0.5 * (steps[-1] - steps[0]) / max(len(steps) - 1, 1) or 0.5
    extent = (steps[0] - pad, steps[-1] + pad, len(keys) + 0.5, 0.5)
    image = axes.imshow(
        matrix_KS,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=_finite(matrix_KS).min(initial=0.0),
        vmax=high,
        extent=extent,
    )
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
    axes.grid(False)
    axes.set_yticks([1, *range(5, len(keys) + 1, 5)])
    _finish(axes, "Rank in the list (1 = top)", legend=False)
    return figure


# ---------------------------------------------------------------------------------------------------------- figures


def validation_ndcg(run: RunCurves) -> Figure | None:
    phases = [("SFT step", run.sft), ("RL step", run.rl)]
    phases = [(label, curves) for label, curves in phases if _ndcg_keys(curves)]
    if not phases:
        return None
    figure, panels = _new_figure(len(phases), sharey=True)
    for axes, (label, curves) in zip(panels, phases, strict=True):
        keys = _ndcg_keys(curves)
        for key, colour, marker in zip((keys[-1], keys[0]), (ORANGE, BLUE), "os", strict=True):
            if key == keys[-1] or len(keys) > 1:
                axes.plot(*curves[key], color=colour, marker=marker, markersize=4, label=key.removeprefix("eval/"))
        _finish(axes, "", label, legend=axes is panels[-1])
    for text in panels[-1].get_legend().get_texts():
        text.set_text(text.get_text().replace("ndcg", "NDCG"))
    panels[0].set_ylabel("NDCG on the validation split")
    panels[0].set_ylim(bottom=0)
    return figure


def _ndcg_keys(curves: Curves) -> list[str]:
    return sorted((key for key in curves if key.startswith("eval/ndcg@")), key=lambda key: int(key.split("@")[1]))


def reward_heatmap(run: RunCurves) -> Figure | None:
    return _rank_heatmap(run.rl, "reward/rank_", "Mean reward")


def reward_lines(run: RunCurves) -> Figure | None:
    mean = [("reward/mean", "mean of all ranks", GREY, "-")]
    return _lines(run.rl, "Mean reward of a sampled item", _rank_lines("reward/rank_") + mean)


def hit_rate_by_rank(run: RunCurves) -> Figure | None:
    summaries = run.evaluations.get(run.headline_split or "", [])
    if not summaries:
        return None
    figure, (axes,) = _new_figure()
    styles = {"before": ("x", ":"), "sft": ("s", "--"), "rank-grpo": ("o", "-")}
    for place, summary in enumerate(summaries):
        name, rates = summary["name"], summary["hit_rate_by_rank"]
        marker, style = styles.get(name, ("^vDP*"[place % 5] if name not in MODEL_LABELS else "", "-."))
        axes.plot(
            range(1, len(rates) + 1), rates, style, marker=marker, markersize=4, linewidth=1.6,
            color=MODEL_COLOURS.get(name, SKY), label=model_label(name),
        )  # fmt: skip
    _percent(figure, 0)
    _finish(axes, "Lists with a hit at this rank (%)", "Rank in the list (1 = top)")
    axes.set_xticks([1, *range(5, len(summaries[0]["hit_rate_by_rank"]) + 1, 5)])
    return figure


def zero_variance(run: RunCurves) -> Figure | None:
    mean = [("reward/zero_std_frac", "all ranks", GREY, "-")]
    figure = _lines(run.rl, "Groups without a gradient (%)", _rank_lines("reward/zero_std_rank_") + mean)
    return _percent(figure)


def zero_variance_heatmap(run: RunCurves) -> Figure | None:
    figure = _rank_heatmap(run.rl, "reward/zero_std_rank_", "Groups without a gradient (%)", high=1.0)
    if figure is not None:
        figure.axes[1].yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
    return figure


def lists_with_a_hit(run: RunCurves) -> Figure | None:
    lines = [("list/hit_frac", "hit", GREEN, "-")]
    return _percent(_lines(run.rl, "Sampled lists with a hit (%)", lines), 0)


def _percent(figure: Figure | None, low: float | None = None, high: float | None = None) -> Figure | None:
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
        figure.axes[0].set_ylim(low, high)
    return figure


def kl_to_reference(run: RunCurves) -> Figure | None:
    return _lines(run.rl, "KL to the SFT model (nats a token)", [("loss/kl", "KL", BLUE, "-")])


def entropy(run: RunCurves) -> Figure | None:
    return _lines(run.rl, "Entropy (nats a token)", [("policy/entropy", "entropy", GREEN, "-")])


def clip_fractions(run: RunCurves) -> Figure | None:
    lines = [
        ("ratio/clip_low_frac", "below the band", BLUE, "-"),
        ("ratio/clip_high_frac", "above the band", ORANGE, "--"),
    ]
    return _percent(_lines(run.rl, "Clipped ranks (%)", lines))


def grad_norm(run: RunCurves) -> Figure | None:
    return _lines(run.rl, "Gradient norm before clipping", [("grad/norm", "norm", PURPLE, "-")])


def list_quality(run: RunCurves) -> Figure | None:
    lines = [
        ("list/parsed_frac", "parsed", BLUE, "-"),
        ("list/in_catalog_frac", "in the catalog", ORANGE, "--"),
        ("list/finished_frac", "ended by itself", GREEN, "-."),
        ("list/duplicate_frac", "repeats", PURPLE, ":"),
    ]
    return _percent(_lines(run.rl, "Share of the sampled lines or lists (%)", lines), -0.03, 1.03)


def list_length(run: RunCurves) -> Figure | None:
    figure = _lines(run.rl, "Lines in a sampled list", [("list/items_mean", "lines", BLUE, "-")])
    if figure is not None:
        figure.axes[0].set_ylim(bottom=0)
    return figure


def list_tokens(run: RunCurves) -> Figure | None:
    figure = _lines(run.rl, "Tokens in a sampled list", [("list/tokens_mean", "tokens", SKY, "-")])
    if figure is not None:
        figure.axes[0].set_ylim(bottom=0)
    return figure


def mismatch(run: RunCurves) -> Figure | None:
    curves = dict(run.rl)
    if "mismatch/exp_abs_logp" in curves:
        steps, values = curves["mismatch/exp_abs_logp"]
        curves["exp - 1"] = (steps, values - 1)
    lines = [("mismatch/abs_logp", "mean |d|", SKY, "-"), ("exp - 1", "mean exp|d| - 1", BLUE, "--")]
    return _lines(curves, "Gap d of the log-probabilities (a token)", lines)


def mismatch_of_ranks(run: RunCurves) -> Figure | None:
    lines = [
        ("mismatch/outside_clip_frac", "outside the clip band", ORANGE, "-"),
        ("mismatch/corrected_frac", "corrected", PURPLE, "--"),
    ]
    return _percent(_lines(run.rl, "Share of the ranks (%)", lines))


def sft_loss(run: RunCurves) -> Figure | None:
    wanted = [("loss/nll", "training", BLUE), ("loss/val_nll", "validation", ORANGE)]
    wanted = [line for line in wanted if line[0] in run.sft]
    if not wanted:
        return None
    figure, (axes,) = _new_figure()
    for key, label, colour in wanted:
        if len(run.sft[key][0]) <= 40:
            axes.plot(*run.sft[key], color=colour, marker="o", markersize=4, label=label)
        else:
            _line(axes, run.sft[key], colour, label)
    _finish(axes, "Negative log-likelihood (nats a token)", "SFT step")
    return figure


def phase_seconds(curves: Curves) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Seconds by step of every `time/<phase>_s` but the total, and what was sampled beside the rest, known phases
    first."""
    apart = ("total", "ahead")
    names = [match[1] for key in curves if (match := re.fullmatch(r"time/(.+)_s", key)) and match[1] not in apart]
    known = ["sample", "score", "update", "sync"]
    names.sort(key=lambda name: (known.index(name) if name in known else len(known), name))
    return {name: curves[f"time/{name}_s"] for name in names}


def seconds_by_step(run: RunCurves) -> Figure | None:
    phases = phase_seconds(run.rl)
    if not phases:
        return None
    keys = [f"time/{name}_s" for name in phases]
    matrix_FS, steps = curve_matrix(run.rl, keys, absent=0.0)
    figure, (axes,) = _new_figure()
    axes.stackplot(steps, np.nan_to_num(matrix_FS), labels=list(phases), colors=PHASE_COLOURS, alpha=0.85, step="mid")
    axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    axes.set_ylim(bottom=0)
    _finish(axes, "Seconds a step, stacked", legend=False)
    figure.legend(loc="outside upper left", ncols=len(phases))
    return figure


def tokens_by_step(run: RunCurves) -> Figure | None:
    wanted = [("tokens/sampled", "sampled", BLUE, "-"), ("tokens/trained", "trained on", ORANGE, "--")]
    wanted = [line for line in wanted if line[0] in run.rl]
    if not wanted:
        return None
    figure, (axes,) = _new_figure()
    for key, label, colour, style in wanted:
        steps, values = run.rl[key]
        axes.plot(steps, np.nancumsum(values) / 1e6, style, color=colour, label=label)
    axes.set_ylim(bottom=0)
    _finish(axes, "Tokens so far (millions)")
    return figure
