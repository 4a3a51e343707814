"""Why did RL hurt? The usual answers, each computed from what a run has logged, with the value that makes it a warning.

`diagnose` takes curves and scored lists and returns plain values; nothing is sampled or trained for it. The thresholds
are rules of thumb, and stand on the page beside every value.
"""

# Shape letters: K ranks, N conversations.
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankgrpo.evaluation.evaluate import Evaluation
from rankgrpo.evaluation.tables import format_value, main_metric, metric_label
from rankgrpo.report.figures import Curves

MAX_FLAT_GROUPS = 0.5
MAX_FLAT_CELLS = 0.95
MIN_COVERAGE = 0.7  # of what the lists before RL named
MAX_POPULAR = 0.10  # more of the lines, as a share
MIN_VALID, MAX_LOST_VALID = 0.9, 0.05
ENTROPY_BAND = (0.5, 1.5)  # times that at the start
MIN_TRAIN_GAIN = 0.10
MAX_CLIPPED = 0.2
MIN_FINISHED = 0.9
MAX_LENGTH_OFF = 0.1
MAX_REPEATS = 0.1


@dataclass(frozen=True)
class Evidence:
    """What the checks read."""

    rl: Curves
    config: Mapping[str, Any]
    lists: Mapping[str, Evaluation]
    """Scored lists by model name."""
    pair: tuple[str, str] | None
    """The stages compared, before and after RL; None without scored lists of both."""
    gain: Mapping[str, Any] | None
    """`evaluate.compare` of the pair, by metric."""

    def ends(self, key: str) -> tuple[float, float] | None:
        """Means over the first and the last quarter of a curve; None where it was not logged."""
        return ends(self.rl[key][1]) if key in self.rl else None

    def now(self, key: str) -> str:
        """The key with the run's value."""
        section, _, name = key.partition(".")
        value = self.config.get(section, {}).get(name)
        return key if value is None else f"{key} (now {value})"

    @property
    def num_ranks(self) -> int | None:
        return self.config.get("data", {}).get("num_ranks")


@dataclass(frozen=True)
class Check:
    """One possible answer."""

    name: str
    value: str
    threshold: str
    """What makes it a warning."""
    warns: bool
    advice: str
    """The setting to try."""


def ends(values: np.ndarray) -> tuple[float, float] | None:
    """Means over the first and the last quarter of the finite values, at least one each."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    quarter = max(1, len(finite) // 4)
    return float(finite[:quarter].mean()), float(finite[-quarter:].mean())


def diagnose(evidence: Evidence) -> dict[str, Any] | None:
    """The section's variables: a verdict in one line, the checks with the warnings first; None for a run without RL.

    A run that gained has its checks folded away.
    """
    after_rl = evidence.pair is None or evidence.pair[1] == "rank-grpo"
    if "reward/mean" not in evidence.rl or not after_rl:
        return None
    found = [check(evidence) for check in CHECKS]
    checks = sorted((check for check in found if check is not None), key=lambda check: not check.warns)
    verdict, gained = _verdict(evidence)
    num_warnings = sum(check.warns for check in checks)
    return {"verdict": verdict, "gained": gained, "checks": checks, "num_warnings": num_warnings}


def _verdict(evidence: Evidence) -> tuple[str, bool]:
    if evidence.gain is None:
        key = _validation_key(evidence)
        if key is None:
            return "There is no evaluation of before and after, and no validation; these are the usual answers.", False
        first, last = float(evidence.rl[key][1][0]), float(evidence.rl[key][1][-1])
        name = key.removeprefix("eval/")
        return (
            f"There is no evaluation of before and after yet. In validation, {metric_label(name)} went from "
            f"{format_value(name, first)} to {format_value(name, last)}.",
            False,
        )
    key = main_metric(evidence.gain)
    gain = evidence.gain[key]
    difference = gain["difference"]
    by = f"{metric_label(key)} {format_value(key, gain['baseline'])} → {format_value(key, gain['candidate'])}"
    if gain["relative"]:
        relative = gain["relative"]
        by += f", {_percent(relative['mean'])} [{_percent(relative['low'])}, {_percent(relative['high'])}]"
    if difference["low"] > 0:
        return f"It did not: RL gained ({by}).", True
    if difference["high"] < 0:
        return f"RL hurt ({by}). The usual answers, from what this run logged:", False
    return f"RL changed nothing that these conversations show ({by}). The usual answers, from what it logged:", False


def _percent(value: float) -> str:
    return f"{100 * value:+.1f}%"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _validation_key(evidence: Evidence) -> str | None:
    keys = [key.removeprefix("eval/") for key in evidence.rl if key.startswith("eval/ndcg@")]
    return f"eval/{main_metric(keys)}" if keys else None


# ---------------------------------------------------------------------------------------------------------- checks


def flat_groups(e: Evidence) -> Check | None:
    """Groups whose lists all earned the same, at the end of the run."""
    found = e.ends("groups/gradient_frac")
    if found is None:
        return None
    flat = 1 - found[1]
    return Check(
        "Groups without a gradient",
        f"{_share(flat)} of the groups in the last quarter of the run",
        f"above {_share(MAX_FLAT_GROUPS)}",
        flat > MAX_FLAT_GROUPS,
        f"larger groups, {e.now('rl.group_size')}; a denser reward, {e.now('rl.reward')}; a better warm start",
    )


def flat_cells(e: Evidence) -> Check | None:
    """(Conversation, rank) cells whose lists all earned the same."""
    found = e.ends("reward/zero_std_frac")
    if found is None:
        return None
    return Check(
        "Ranks without a gradient",
        f"{_share(found[1])} of the (conversation, rank) cells in the last quarter",
        f"above {_share(MAX_FLAT_CELLS)}",
        found[1] > MAX_FLAT_CELLS,
        f"larger groups, {e.now('rl.group_size')}; more conversations a step, {e.now('rl.prompts_per_step')}",
    )


def coverage(e: Evidence) -> Check | None:
    """Different catalog items in the scored lists, after RL against before."""
    if e.pair is None:
        return None
    before, after = (len(_named(e.lists[name])) for name in e.pair)
    if not before:
        return None
    return Check(
        "Coverage of the catalog",
        f"{before} → {after} different items over the scored lists",
        f"below {_share(MIN_COVERAGE)} of before",
        after < MIN_COVERAGE * before,
        f"a stronger pull to the warm start, {e.now('rl.kl_coef')}; a smaller {e.now('rl.lr')}; novelty in rl.reward",
    )


def popularity(e: Evidence) -> Check | None:
    """Lines that name an item of the popularity list, after RL against before."""
    if e.pair is None or "popularity" not in e.lists:
        return None
    popular = _named(e.lists["popularity"])
    before, after = (_share_among(e.lists[name], popular) for name in e.pair)
    return Check(
        "Drift to what is popular",
        f"{_share(before)} → {_share(after)} of the lines name one of the {len(popular)} most popular items",
        f"more than {100 * MAX_POPULAR:.0f} points up",
        after - before > MAX_POPULAR,
        f"a stronger pull to the warm start, {e.now('rl.kl_coef')}; novelty in {e.now('rl.reward')}",
    )


def validity(e: Evidence) -> Check | None:
    """Lines that name a catalog item when nothing holds them to it, at the first and the last validation."""
    key = next((k for k in ("eval_free/in_catalog_frac", "eval/in_catalog_frac") if k in e.rl), None)
    if key is None:
        return None
    first, last = float(e.rl[key][1][0]), float(e.rl[key][1][-1])
    held = " of free lists" if key.startswith("eval_free") else ""
    return Check(
        "Validity of free lists",
        f"{_share(first)} → {_share(last)} of the lines{held} name a catalog item in validation",
        f"below {_share(MIN_VALID)}, or {100 * MAX_LOST_VALID:.0f} points down",
        last < MIN_VALID or first - last > MAX_LOST_VALID,
        f"a smaller {e.now('rl.lr')}; a larger {e.now('rl.kl_coef')}; 0.1 * in_catalog in rl.reward",
    )


def entropy(e: Evidence) -> Check | None:
    """How undecided the policy is, at the end against the start."""
    key = next((k for k in ("policy/entropy_a_choice", "policy/entropy") if k in e.rl), None)
    found = e.ends(key) if key else None
    if found is None or not found[0] > 0:
        return None
    low, high = ENTROPY_BAND
    return Check(
        "Entropy of the policy",
        f"{found[0]:.2f} → {found[1]:.2f} a {'choice' if key.endswith('choice') else 'token'}",
        f"below {low:g} or above {high:g} times the start",
        not low <= found[1] / found[0] <= high,
        f"a smaller {e.now('rl.lr')}; a larger {e.now('rl.kl_coef')}; a higher {e.now('rl.clip_high')} when it falls",
    )


def overfitting(e: Evidence) -> Check | None:
    """Reward of the training lists against validation."""
    key, reward = _validation_key(e), e.ends("reward/mean")
    if key is None or reward is None or not reward[0] > 0:
        return None
    scores = e.rl[key][1]
    first, last = float(scores[0]), float(scores[-1])
    gain = reward[1] / reward[0] - 1
    name = metric_label(key.removeprefix("eval/"))
    change = f"{_percent(last / first - 1)}" if first > 0 else f"{last - first:+.4f}"
    return Check(
        "Training reward against validation",
        f"training reward {_percent(gain)}, validation {name} {change}",
        f"reward up by {100 * MIN_TRAIN_GAIN:.0f}% and more, validation down",
        gain >= MIN_TRAIN_GAIN and last < first,
        f"fewer passes, {e.now('rl.num_epochs')} and {e.now('rl.num_steps')}; more training data; a larger "
        f"{e.now('rl.kl_coef')}",
    )


def clipping(e: Evidence) -> Check | None:
    """Ranks whose ratio left the clip band, over the whole run."""
    if "ratio/clip_low_frac" not in e.rl or "ratio/clip_high_frac" not in e.rl:
        return None
    clipped = sum(float(np.nanmean(e.rl[f"ratio/clip_{side}_frac"][1])) for side in ("low", "high"))
    return Check(
        "Clipped ratios",
        f"{_share(clipped)} of the units, over the run",
        f"above {_share(MAX_CLIPPED)}",
        clipped > MAX_CLIPPED,
        f"a smaller {e.now('rl.lr')}; fewer {e.now('rl.updates_per_batch')}; a wider band, {e.now('rl.clip_high')}",
    )


def cut_lists(e: Evidence) -> Check | None:
    """Lists that ended by themselves."""
    found = e.ends("list/finished_frac")
    if found is None:
        return None
    return Check(
        "Lists cut before their end",
        f"{_share(1 - found[0])} → {_share(1 - found[1])} of the sampled lists",
        f"above {_share(1 - MIN_FINISHED)}",
        found[1] < MIN_FINISHED,
        f"a larger {e.now('rl.max_new_tokens')}; a stronger {e.now('rl.overflow_penalty')}; rl.constrain=catalog",
    )


def length(e: Evidence) -> Check | None:
    """Lines of a sampled list against those asked for."""
    found = e.ends("list/items_mean")
    if found is None or not e.num_ranks:
        return None
    return Check(
        "Length of the lists",
        f"{found[0]:.1f} → {found[1]:.1f} lines, asked for {e.num_ranks}",
        f"more than {100 * MAX_LENGTH_OFF:.0f}% off",
        abs(found[1] / e.num_ranks - 1) > MAX_LENGTH_OFF,
        f"{e.now('rl.overflow_penalty')} or {e.now('rl.early_eos_penalty')} further below 0; rl.constrain=catalog",
    )


def repeats(e: Evidence) -> Check | None:
    """Lines of the sampled lists that name an item again."""
    found = e.ends("list/duplicate_frac")
    if found is None:
        return None
    return Check(
        "Repeats",
        f"{_share(found[0])} → {_share(found[1])} of the lines name an item again",
        f"above {_share(MAX_REPEATS)}",
        found[1] > MAX_REPEATS,
        f"rl.constrain=catalog; or {e.now('rl.repeat_penalty')} below 0",
    )


def by_rank(e: Evidence) -> Check | None:
    """Hits at the top of the list and below it, after RL against before."""
    if e.pair is None:
        return None
    before, after = (e.lists[name].hits.double().mean(0).numpy() for name in e.pair)
    top = max(1, len(before) // 4)
    if len(before) <= top:
        return None
    parts = [(part[:top].mean(), part[top:].mean()) for part in (before, after)]
    (old_top, old_rest), (new_top, new_rest) = parts
    return Check(
        "Effect by rank",
        f"hit rate {old_top:.4f} → {new_top:.4f} at ranks 1 to {top}, {old_rest:.4f} → {new_rest:.4f} below",
        "down at the top while it rises below",
        bool(new_top < old_top and new_rest > old_rest),
        f"{e.now('rl.returns')}: log also credits a rank for hits below it; {e.now('rl.scale_by_std')} off",
    )


CHECKS: tuple[Callable[[Evidence], Check | None], ...] = (
    flat_groups, flat_cells, coverage, popularity, validity, entropy, overfitting, clipping, cut_lists, length, repeats,
    by_rank,
)  # fmt: skip


def _named(evaluation: Evaluation) -> set[tuple[str, int]]:
    """The catalog items that its lists name."""
    return {(mark["title"], mark["year"]) for row in evaluation.rows for mark in row["items"] if mark["in_catalog"]}


def _share_among(evaluation: Evaluation, items: set[tuple[str, int]]) -> float:
    """Share of the lines that name one of the items."""
    marks = [mark for row in evaluation.rows for mark in row["items"]]
    return sum((mark["title"], mark["year"]) in items for mark in marks) / max(len(marks), 1)
