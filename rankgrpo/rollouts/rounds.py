"""The rounds of sampling that make up one step: fresh conversations, and more lists for hard ones.

Usually a step is one round: rl.prompts_per_step conversations, rl.group_size lists each. A conversation whose lists all
earned the same teaches nothing. With rl.hard_group_size it gets more lists, and its group is all of them; with
rl.live_groups further rounds of fresh conversations follow until so many groups of the step carry a gradient, at most
rl.max_rounds, and those without one no longer count in the mean.
"""

# Shape letters: P prompts, G lists a prompt, B = P*G.
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rankgrpo.config import Config, RlConfig
from rankgrpo.data.order import BatchOrder
from rankgrpo.data.samples import Sample
from rankgrpo.items.choices import Choices
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Policy
from rankgrpo.rollouts.score import ScoredGroups, Scorer, score_groups
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.runtime.means import Means
from rankgrpo.sampler.base import Rollout, Sampler, prompt_seed


@dataclass(frozen=True)
class Round:
    """P conversations, the G lists sampled for each, and what they earned."""

    indices: list[int]
    """Of the training samples."""
    examples: list[Sample]
    groups: list[Group]
    rollouts: list[list[Rollout]]
    choices: Choices | None
    scored: ScoredGroups
    rl: RlConfig
    """With the group size of this round."""
    kept: list[int]
    """Groups that count in the step's mean."""
    score_s: float
    """Seconds of scoring."""

    @property
    def chosen(self) -> list[int]:
        """Groups that are trained on. Without a KL term one whose lists all earned the same moves nothing: it is left
        out and stays in the count."""
        return [p for p in self.kept if self.scored.carries_gradient[p] or self.rl.kl_coef > 0]

    @property
    def flat(self) -> list[int]:
        """Groups that carry no gradient."""
        return [p for p, carries in enumerate(self.scored.carries_gradient) if not carries]

    @property
    def denominator(self) -> float:
        """What the kept groups add to the denominator of the step's loss."""
        if len(self.kept) == len(self.groups):
            return self.scored.denominator
        G, unit_BT = self.rl.group_size, self.scored.units.unit_BT
        lists = [p * G + g for p in self.kept for g in range(G)]
        if self.rl.reduction == "token" or (self.rl.unit == "token" and self.rl.token_mean == "batch"):
            return float((unit_BT[lists] >= 0).sum())
        return self.scored.denominator * len(lists) / len(unit_BT)

    def keep(self, kept: Sequence[int]) -> Round:
        return replace(self, kept=list(kept))


@dataclass(frozen=True)
class RoundMaker:
    """Samples and scores rounds; `prompts` and `seen` belong to `samples`, by index."""

    policy: Policy
    sampler: Sampler
    scorer: Scorer
    samples: Sequence[Sample]
    prompts: Sequence[list[int]]
    seen: Sequence[Sequence[int]]
    config: Config

    def make(self, indices: list[int], step: int, means: Means) -> Round:
        """A round of fresh conversations."""
        rl = self.config.rl
        rollouts = self.sampler.sample(**self.request(indices, step, rl.group_size))
        return self._score(indices, rollouts, rl, means)

    def enlarge(self, first: Round, step: int) -> Round | None:
        """The groups of `first` without a gradient, each with rl.hard_group_size lists: its own and new ones.

        None where there is none. What is logged of a step's lists is of those that every conversation gets.
        """
        rl = self.config.rl
        indices = [first.indices[p] for p in first.flat]
        if not indices:
            return None
        new = self.sampler.sample(**self.request(indices, step, rl.hard_group_size - rl.group_size, "\0more"))
        rollouts = [[*first.rollouts[p], *more] for p, more in zip(first.flat, new, strict=True)]
        return self._score(indices, rollouts, replace(rl, group_size=rl.hard_group_size, hard_group_size=0), Means())

    def request(self, indices: list[int], step: int, group_size: int, salt: str = "") -> dict[str, Any]:
        """Arguments of `Sampler.sample` for lists of these conversations; `salt` gives further lists seeds of their
        own."""
        rl = self.config.rl
        return {
            "prompts": [self.prompts[i] for i in indices],
            "group_size": group_size,
            "seeds": [prompt_seed(self.config.seed, step, f"{self.samples[i].id}{salt}") for i in indices],
            "max_new_tokens": rl.max_new_tokens,
            "temperature": rl.temperature,
            "seen": [self.seen[i] for i in indices],
        }

    def _score(self, indices: list[int], rollouts: list[list[Rollout]], rl: RlConfig, means: Means) -> Round:
        began = time.perf_counter()
        examples = [self.samples[i] for i in indices]
        groups = [
            Group(self.prompts[i], [rollout.token_ids for rollout in lists], self.seen[i])
            for i, lists in zip(indices, rollouts, strict=True)
        ]
        choices = None if self.policy.constraint is None else self.policy.constraint.choices(groups)
        scored = score_groups(rollouts, examples, replace(self.scorer, rl=rl), means, choices)
        seconds = time.perf_counter() - began
        return Round(indices, examples, groups, rollouts, choices, scored, rl, list(range(len(indices))), seconds)


def make_rounds(
    maker: RoundMaker, order: BatchOrder, batch: int, step: int, means: Means, parallel: Parallel
) -> tuple[list[Round], int]:
    """The rounds of a step, the first one of the `order`'s batch number `batch`, and the number of the next batch.

    Every process makes as many rounds of fresh conversations as the others.
    """
    rl = maker.config.rl
    rounds: list[Round] = []
    num_live = num_rounds = 0
    while num_rounds == 0 or (num_live < rl.live_groups and num_rounds < rl.max_rounds):
        made = [maker.make(order.indices(batch), step, means)]
        if rl.hard_group_size and (larger := maker.enlarge(made[0], step)) is not None:
            flat = set(made[0].flat)
            made = [made[0].keep(p for p in range(len(made[0].groups)) if p not in flat), larger]
        live = sum(len(one.groups) - len(one.flat) for one in made)
        if rl.hard_group_size:
            hard = made[1:]
            num_hard = sum(len(one.groups) for one in hard)
            means.add("groups/hard_live_frac", num_hard - sum(len(one.flat) for one in hard), num_hard)
        num_live += int(parallel.sum([live])[0])
        if rl.live_groups:
            made = [one.keep(p for p in one.kept if one.scored.carries_gradient[p]) for one in made]
        rounds += made
        batch, num_rounds = batch + 1, num_rounds + 1
    if rl.live_groups:
        means.add("groups/rounds", num_rounds, 1)
        means.add("groups/live", num_live, 1)
    return rounds, batch


def describe_rounds(rounds: Sequence[Round], rl: RlConfig, means: Means, parallel: Parallel) -> None:
    """The shares of a step's groups that are trained on and that carry a gradient, and the tokens sampled for it."""
    num_groups = sum(len(one.groups) for one in rounds if one.rl.group_size == rl.group_size)
    means.add("groups/trained_frac", sum(len(one.chosen) for one in rounds), num_groups)
    means.add("groups/gradient_frac", sum(sum(one.scored.carries_gradient) for one in rounds), num_groups)
    num_tokens = sum(len(rollout.token_ids) for one in rounds for group in one.rollouts for rollout in group)
    means.add("tokens/sampled", num_tokens, 1 / parallel.dp_world)
