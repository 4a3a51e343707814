"""From sampled lists to units: parse once, reward, returns, group advantage; and what to log of the lists."""

# Shape letters: P prompts, G lists a prompt, B = P*G, K ranks, U units that have an advantage (K ranks, or 1 list).
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankgrpo.advantage import group_advantage
from rankgrpo.config import RlConfig, reward_terms
from rankgrpo.data.candidates import sample_catalog
from rankgrpo.data.samples import Sample
from rankgrpo.items.catalog import Catalog
from rankgrpo.items.choices import Choices
from rankgrpo.loss import rank_log_ratio
from rankgrpo.parse import RankSegmenter
from rankgrpo.reward import list_return, rank_returns, unlikeliness_reward
from rankgrpo.rollouts.parts import Answer, Part, load_parts, measure, repetition
from rankgrpo.runtime.means import Means
from rankgrpo.sampler.base import Rollout
from rankgrpo.units import Units, make_units


@dataclass(frozen=True)
class Scorer:
    """What scoring needs in every step of a run, opened once; made by `Scorer.open`."""

    catalog: Catalog
    rl: RlConfig
    num_ranks: int
    segmenter: RankSegmenter
    eos_ids: Tensor
    parts: Mapping[str, Part]

    @classmethod
    def open(
        cls, catalog: Catalog, rl: RlConfig, num_ranks: int, segmenter: RankSegmenter, eos_ids: Sequence[int]
    ) -> Scorer:
        """Open what scoring needs. Raises ConfigError for a part of rl.reward that cannot be computed."""
        parts = load_parts("relevance", catalog) | load_parts(rl.reward, catalog)
        return cls(catalog, rl, num_ranks, segmenter, torch.tensor(eos_ids), parts)


@dataclass(frozen=True)
class ScoredGroups:
    """Rewards of P groups of G lists, and the units that the loss moves."""

    reward_PGK: Tensor
    """Return of every rank (Eq. 8, 9), of the weighted sum of the reward's parts."""
    advantage_PGU: Tensor
    """Advantage of every rank, or one a list (last axis 1) when the unit is the token or the list."""
    units: Units
    """Units of all B lists, penalties included."""
    carries_gradient: list[bool]
    """By group, whether any unit of its lists has an advantage."""
    denominator: float
    """What these lists add to the denominator of the step's loss, whether they carry a gradient or not."""


def score_groups(
    groups: list[list[Rollout]],
    examples: list[Sample],
    scorer: Scorer,
    means: Means,
    choices: Choices | None = None,
) -> ScoredGroups:
    """Score sampled groups against their examples; adds reward/*, reward_part/* and list/* to `means`.

    choices: what was allowed at every token, where lists are held to the catalog. Forced tokens then belong to no unit,
    unless rl.count_forced.
    """
    rl = scorer.rl
    P, G, K = len(groups), rl.group_size, scorer.num_ranks
    flat = [rollout for rollouts in groups for rollout in rollouts]
    answers = [
        Answer(example, rollout.text, rollout.finished, own, K, rl.year_tolerance)
        for rollouts, example in zip(groups, examples, strict=True)
        for own in [sample_catalog(example, scorer.catalog)]
        for rollout in rollouts
    ]
    for answer, rollout in zip(answers, flat, strict=True):
        _describe_list(answer, rollout, means)
    values = {name: measure(name, part, answers) for name, part in scorer.parts.items()}
    rank_BT, eos_BT = list_ranks(flat, scorer)
    if choices is not None:
        _describe_choices(choices, flat, means)
        if not rl.count_forced:
            rank_BT = rank_BT.masked_fill(~_is_choice(choices, rank_BT >= 0), -1)

    reward_BK, scored_BU = torch.zeros(P * G, K), torch.zeros(P * G, K if rl.unit == "rank" else 1)
    of_parts_PGU = torch.zeros(P, G, scored_BU.shape[1])
    for name, weight in reward_terms(rl.reward).items():
        means.add(f"reward_part/{name}", values[name].sum(), values[name].numel())
        of_ranks_BK, of_units_BU = _returns(values[name], rl, K)
        reward_BK = reward_BK + weight * of_ranks_BK
        if name == "relevance" and rl.unlikeliness:
            of_units_BU = _unlikely(of_units_BU, flat, rank_BT, rl)
        scored_BU = scored_BU + weight * of_units_BU
        if rl.normalise == "parts":
            of_units_PGU = of_units_BU.view(P, G, -1)
            of_parts_PGU = of_parts_PGU + weight * group_advantage(of_units_PGU, scale_by_std=rl.scale_by_std)
    reward_PGK, scored_PGU = reward_BK.view(P, G, K), scored_BU.view(P, G, -1)
    advantage_PGU = of_parts_PGU  # GDPO (arXiv 2601.05242) without its last scaling of the batch
    if rl.normalise == "sum":
        advantage_PGU = group_advantage(scored_PGU, scale_by_std=rl.scale_by_std)
    if rl.repeat_penalty:
        # After normalisation: before it, a repeat would weigh as much as a hit wherever no list of the group has one,
        # which is almost everywhere. Less the group's mean: only pushed down, a model learns to say anything else.
        repeat_PGK = torch.stack([repetition(answer) for answer in answers]).view(P, G, K)
        advantage_PGU = advantage_PGU + rl.repeat_penalty * (repeat_PGK - repeat_PGK.mean(1, keepdim=True))
    _describe_rewards(values["relevance"].view(P, G, K), reward_PGK, scored_PGU, means)

    units = make_units(
        rank_BT,
        eos_BT,
        advantage_PGU.flatten(0, 1),
        unit=rl.unit,
        num_ranks=K,
        overflow_penalty=rl.overflow_penalty,
        early_eos_penalty=rl.early_eos_penalty,
        full_list_bonus=rl.full_list_bonus,
        mean_by_list=rl.token_mean == "list",
    )
    carries = (units.advantage_BU != 0).view(P, -1).any(1).tolist()
    return ScoredGroups(reward_PGK, advantage_PGU, units, carries, _denominator(units, rl))


def list_ranks(rollouts: list[Rollout], scorer: Scorer) -> tuple[Tensor, Tensor]:
    """Rank of every token, -1 after a list's end, and which tokens end a list: (B, T) each."""
    ids_BT = pad_sequence([torch.tensor(rollout.token_ids) for rollout in rollouts], batch_first=True)
    length_B1 = torch.tensor([[len(rollout.token_ids)] for rollout in rollouts])
    mask_BT = torch.arange(ids_BT.shape[1]) < length_B1
    return scorer.segmenter(ids_BT, mask_BT), torch.isin(ids_BT, scorer.eos_ids) & mask_BT


def _is_choice(choices: Choices, mask_BT: Tensor) -> Tensor:
    choice_BT = torch.zeros_like(mask_BT)
    choice_BT[mask_BT] = torch.from_numpy(choices.is_choice)
    return choice_BT


def _denominator(units: Units, rl: RlConfig) -> float:
    """The denominator of the units, but for the two means that are not over units: over tokens, over a fixed length."""
    if rl.reduction == "token":
        return int((units.unit_BT >= 0).sum())
    if rl.token_mean == "max":
        return len(units.unit_BT) * rl.max_new_tokens
    return float(units.denominator)


def _returns(value: Tensor, rl: RlConfig, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Turn what a part gives ranks, or whole lists, into the returns of the ranks (B, K) and of the units (B, U)."""
    if value.ndim == 1:
        return value[:, None].expand(-1, num_ranks), value[:, None]
    gamma = rl.gamma if rl.returns == "exp" else None
    return_BK = rank_returns(value, kind=rl.returns, gamma=gamma)
    return return_BK, return_BK if rl.unit == "rank" else list_return(value)[:, None]


def _unlikely(reward_BU: Tensor, rollouts: list[Rollout], rank_BT: Tensor, rl: RlConfig) -> Tensor:
    by_rank = rl.unit == "rank"
    B, U = reward_BU.shape
    logp_BU = mean_logp(rollouts, rank_BT if by_rank else rank_BT.clamp(max=0), U)
    reward_PGU, logp_PGU = (x.view(B // rl.group_size, rl.group_size, U) for x in (reward_BU, logp_BU))
    return unlikeliness_reward(reward_PGU, logp_PGU, rl.unlikeliness, among_hits=by_rank).view(B, U)


def mean_logp(rollouts: list[Rollout], unit_BT: Tensor, num_units: int) -> Tensor:
    """(B, U) mean log-prob of the tokens of every unit under the sampler."""
    logp_BT = pad_sequence([torch.tensor(rollout.logp) for rollout in rollouts], batch_first=True)
    return rank_log_ratio(logp_BT, torch.zeros_like(logp_BT), unit_BT, num_units)


def _describe_list(answer: Answer, rollout: Rollout, means: Means) -> None:
    items, num_ranks = answer.items, answer.num_ranks
    num_parsed = sum(item.title is not None for item in items)
    in_catalog = [index for index in answer.indices if index is not None]
    means.add("list/items_mean", len(items), 1)
    means.add("list/tokens_mean", len(rollout.token_ids), 1)
    means.add("list/finished_frac", rollout.finished, 1)
    means.add("list/full_frac", rollout.finished and len(items) == num_ranks, 1)
    means.add("list/parsed_frac", num_parsed, len(items))
    means.add("list/in_catalog_frac", len(in_catalog), len(items))
    means.add("list/duplicate_frac", len(in_catalog) - len(set(in_catalog)), len(items))
    # E[-log p] over sampled tokens is the policy's entropy a token, estimated from the very samples.
    means.add("policy/entropy", -sum(rollout.logp), len(rollout.logp))


def _describe_choices(choices: Choices, rollouts: list[Rollout], means: Means) -> None:
    num_choices, num_tokens = len(choices.token_C), choices.num_tokens
    means.add("list/forced_frac", num_tokens - num_choices, num_tokens)
    means.add("list/allowed_mean", choices.num_allowed[choices.token_C].sum(), num_choices)
    means.add("policy/entropy_a_choice", -sum(sum(rollout.logp) for rollout in rollouts), num_choices)


def _describe_rewards(relevance_PGK: Tensor, reward_PGK: Tensor, scored_PGU: Tensor, means: Means) -> None:
    P, G, K = reward_PGK.shape
    means.add("reward/mean", reward_PGK.sum(), P * G * K)
    means.add("list/hit_frac", (relevance_PGK.sum(2) > 0).sum(), P * G)
    means.add("list/hits_mean", (relevance_PGK > 0).sum(), P * G)
    # A cell whose G rewards are equal has no advantage, so it teaches nothing.
    flat_PU = scored_PGU.amin(1) == scored_PGU.amax(1)
    means.add("reward/zero_std_frac", flat_PU.sum(), flat_PU.numel())
    for rank in range(K):
        means.add(f"reward/rank_{rank:02d}", reward_PGK[:, :, rank].sum(), P * G)
        if flat_PU.shape[1] == K:
            means.add(f"reward/zero_std_rank_{rank:02d}", flat_PU[:, rank].sum(), P)
