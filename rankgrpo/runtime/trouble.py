"""Signs in the metrics that a run learns nothing or comes apart, each with a setting to try.

Each sign is a rule over the rows of metrics.jsonl alone, so that a run, its resumption and its report find the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rankgrpo.config import Config

Row = Mapping[str, float]

PATIENCE = 5
"""Steps in a row that must show a sign."""
FLAT = 0.999
"""Share of the (conversation, rank) cells with equal rewards from which a step teaches nothing."""
FEW_FINISHED = 0.1
"""Share of the lists that reach their end, at or below which nearly all are cut."""
LITTLE_ENTROPY = 0.01
"""Nats a token, or a choice where lists are held to the catalog, below which all lists of a group are one."""
HALF = 0.5
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Trouble:
    """One sign, found at `step`. Example: Trouble("cut", 5, "nearly all lists are cut ...", "rl.max_new_tokens=160")"""

    kind: str
    step: int
    what: str
    remedy: str
    """Setting and value to try, as --set takes them."""

    def __str__(self) -> str:
        return f"RL step {self.step}: {self.what}; try {self.remedy}"


class Watch:
    """Reads the rows of a run in order and finds each kind of trouble once, where it shows first."""

    def __init__(self, config: Config):
        self.config = config
        self.first: Row | None = None
        self.recent: deque[Row] = deque(maxlen=PATIENCE)
        self.told: set[str] = set()

    def add(self, row: Row) -> list[Trouble]:
        """The kinds of trouble that this row is the first to show."""
        self.first = self.first or row
        self.recent.append(row)
        found = []
        for kind, rule in _RULES.items():
            if kind not in self.told and (told := rule(self.first, self.recent, self.config)) is not None:
                self.told.add(kind)
                found.append(Trouble(kind, int(row["step"]), *told))
        return found


def find_troubles(rows: Iterable[Row], config: Config) -> list[Trouble]:
    """Every kind of trouble in the rows of a run so far, each at its first step."""
    watch = Watch(config)
    return [trouble for row in rows for trouble in watch.add(row)]


def _last(recent: Sequence[Row], key: str) -> list[float] | None:
    """The key's values in the last PATIENCE rows; None when there are not so many."""
    values = [row[key] for row in recent if key in row]
    return values if len(values) == PATIENCE else None


def _collapsed(first: Row, recent: Sequence[Row], config: Config) -> tuple[str, str] | None:
    key = "policy/entropy_a_choice" if config.rl.constrain == "catalog" else "policy/entropy"
    values = _last(recent, key)
    if values is None or max(values) >= LITTLE_ENTROPY:
        return None
    return (
        f"the policy has collapsed: {key} was below {LITTLE_ENTROPY:g} for {PATIENCE} steps, so the lists of a "
        f"conversation are all the same and nothing can be learned from them",
        f"rl.lr={config.rl.lr / 4:g} and rl.temperature=1.0 in a new run folder",
    )


def _cut(first: Row, recent: Sequence[Row], config: Config) -> tuple[str, str] | None:
    values = _last(recent, "list/finished_frac")
    if values is None or max(values) > FEW_FINISHED:
        return None
    return (
        f"nearly all lists are cut: at most {max(values):.0%} reached their end within rl.max_new_tokens = "
        f"{config.rl.max_new_tokens} for {PATIENCE} steps",
        f"rl.max_new_tokens={2 * config.rl.max_new_tokens} in a new run folder",
    )


def _flat(first: Row, recent: Sequence[Row], config: Config) -> tuple[str, str] | None:
    values = _last(recent, "reward/zero_std_frac")
    if values is None or min(values) < FLAT or _collapsed(first, recent, config) or _cut(first, recent, config):
        return None
    rl, mean = config.rl, recent[-1].get("reward/mean", 0.0)
    if rl.reward != "relevance":
        remedy = "rl.reward=relevance"
    else:
        longer = f"sft.num_epochs={2 * config.sft.num_epochs:g}"
        remedy = f"rl.group_size={2 * rl.group_size}, or a longer warm start ({longer}),"
    return (
        f"no gradient: all lists of a conversation earned the same for {PATIENCE} steps (reward/mean is {mean:g})",
        f"{remedy} in a new run folder",
    )


def _fallen(first: Row, recent: Sequence[Row], config: Config) -> tuple[str, str] | None:
    key = f"eval/ndcg@{config.data.num_ranks}"
    error = key.replace("eval/", "eval/se_")
    row = recent[-1]
    if first["step"] != 0 or key not in first or key not in row:
        return None
    start, end = first[key], row[key]
    noise = STANDARD_ERRORS * (first.get(error, 0.0) ** 2 + row.get(error, 0.0) ** 2) ** 0.5
    if end >= HALF * start or start - end <= noise:
        return None
    return (
        f"validation has fallen below half of the start: {key} {start:.4f} -> {end:.4f}",
        f"rl.lr={config.rl.lr / 4:g} or rl.kl_coef={max(10 * config.rl.kl_coef, 0.01):g} in a new run folder",
    )


_RULES: Mapping[str, Callable[[Row, Sequence[Row], Config], tuple[str, str] | None]] = {
    "collapsed": _collapsed,
    "cut": _cut,
    "flat": _flat,
    "fallen": _fallen,
}
