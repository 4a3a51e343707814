"""From sampled lists to advantages: parse once, relevance, returns, group advantage; and what to log of the lists."""

# Shape letters: P prompts, G lists a prompt, K ranks.
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankgrpo.advantage import group_advantage
from rankgrpo.catalog import Catalog
from rankgrpo.config import RlConfig
from rankgrpo.data import Sample
from rankgrpo.distributed import Means
from rankgrpo.loss import rank_log_ratio
from rankgrpo.parse import ListedItem, RankSegmenter, parse_list
from rankgrpo.reward import list_return, rank_returns, relevance, unlikeliness_reward
from rankgrpo.sampler.base import Rollout


@dataclass(frozen=True)
class ScoredGroups:
    """Rewards and advantages of P groups of G lists."""

    reward_PGK: Tensor
    """Return of every rank (Eq. 8, 9)."""
    advantage_PGU: Tensor
    """Advantage of every rank, or one a list (last axis 1) when the unit is the token or the list."""
    carries_gradient: list[bool]
    """By group: does any of its lists have an advantage or a penalty?"""


def score_groups(
    groups: list[list[Rollout]],
    examples: list[Sample],
    catalog: Catalog,
    rl: RlConfig,
    num_ranks: int,
    means: Means,
    segmenter: RankSegmenter | None = None,
) -> ScoredGroups:
    """Score sampled groups against their examples' ground truth; adds reward/* and list/* to `means`.

    segmenter: finds the tokens of a rank, needed for rl.unlikeliness only.
    """
    relevance_rows, repeat_rows, has_penalty = [], [], []
    for rollouts, example in zip(groups, examples, strict=True):
        penalised = False
        for rollout in rollouts:
            items = parse_list(rollout.text)
            relevance_rows.append(
                relevance(
                    items,
                    example.groundtruth,
                    catalog=catalog,
                    seen=example.seen_titles,
                    num_ranks=num_ranks,
                    year_tolerance=rl.year_tolerance,
                )
            )
            repeat_rows.append(repeats(items, catalog, num_ranks))
            _describe_list(items, rollout, catalog, num_ranks, means)
            overflows, early = len(items) > num_ranks, rollout.finished and len(items) < num_ranks
            penalised |= bool(overflows and rl.overflow_penalty) or bool(early and rl.early_eos_penalty)
            penalised |= bool(rl.full_list_bonus and rollout.finished and len(items) == num_ranks)
        has_penalty.append(penalised)
    P, G = len(groups), rl.group_size
    relevance_BK = torch.stack(relevance_rows)
    gamma = rl.gamma if rl.returns == "exp" else None
    reward_PGK = rank_returns(relevance_BK, kind=rl.returns, gamma=gamma).view(P, G, num_ranks)
    scored_PGU = reward_PGK if rl.unit == "rank" else list_return(relevance_BK).view(P, G, 1)
    if rl.unlikeliness:
        by_rank = rl.unit == "rank"
        if by_rank and segmenter is None:
            raise ValueError("rl.unlikeliness with rl.unit = rank needs a segmenter, to find the tokens of a rank")
        flat = [rollout for rollouts in groups for rollout in rollouts]
        logp_BU = mean_logp(flat, segmenter if by_rank else None, scored_PGU.shape[2])
        scored_PGU = unlikeliness_reward(scored_PGU, logp_BU.view(P, G, -1), rl.unlikeliness, among_hits=by_rank)
    advantage_PGU = group_advantage(scored_PGU, scale_by_std=rl.scale_by_std)
    if rl.repeat_penalty:
        # After normalisation, like the other penalties: before it, a repeat would weigh as much as a hit wherever no
        # list of the group has one, which is almost everywhere.
        advantage_PGU = advantage_PGU + rl.repeat_penalty * torch.stack(repeat_rows).view(P, G, num_ranks)
    _describe_rewards(relevance_BK.view(P, G, num_ranks), reward_PGK, scored_PGU, means)
    has_advantage = (advantage_PGU != 0).flatten(1).any(1).tolist()
    # Penalties belong to ranks: with another unit they do not apply.
    carries = [a or (p and rl.unit == "rank") for a, p in zip(has_advantage, has_penalty, strict=True)]
    return ScoredGroups(reward_PGK, advantage_PGU, carries)


def mean_logp(rollouts: list[Rollout], segmenter: RankSegmenter | None, num_ranks: int) -> Tensor:
    """(B, K) mean log-prob of the tokens of every rank under the sampler; without a segmenter (B, 1), of the list."""
    ids_BT, logp_BT = (
        pad_sequence([torch.tensor(values) for values in rows], batch_first=True)
        for rows in ([rollout.token_ids for rollout in rollouts], [rollout.logp for rollout in rollouts])
    )
    length_B1 = torch.tensor([[len(rollout.token_ids)] for rollout in rollouts])
    mask_BT = torch.arange(ids_BT.shape[1]) < length_B1
    rank_BT = torch.where(mask_BT, 0, -1) if segmenter is None else segmenter(ids_BT, mask_BT)
    return rank_log_ratio(logp_BT, torch.zeros_like(logp_BT), rank_BT, num_ranks)


def repeats(items: list[ListedItem], catalog: Catalog, num_ranks: int) -> Tensor:
    """(K,) 1 where a line names an item that an earlier line named, by catalog item or by title and year outside it."""
    repeat_K, earlier = torch.zeros(num_ranks), set()
    for rank, item in enumerate(items[:num_ranks]):
        if item.title is None:
            continue
        index = catalog.lookup(item.title, item.year)
        key = (catalog.title_key(item.title), item.year) if index is None else index
        repeat_K[rank] = key in earlier
        earlier.add(key)
    return repeat_K


def _describe_list(items, rollout: Rollout, catalog: Catalog, num_ranks: int, means: Means) -> None:
    parsed = [(item.title, item.year) for item in items if item.title is not None]
    known = [catalog.lookup(title, year) for title, year in parsed]
    in_catalog = [index for index in known if index is not None]
    means.add("list/items_mean", len(items), 1)
    means.add("list/tokens_mean", len(rollout.token_ids), 1)
    means.add("list/finished_frac", rollout.finished, 1)
    means.add("list/full_frac", rollout.finished and len(items) == num_ranks, 1)
    means.add("list/parsed_frac", len(parsed), len(items))
    means.add("list/in_catalog_frac", len(in_catalog), len(items))
    means.add("list/duplicate_frac", len(in_catalog) - len(set(in_catalog)), len(items))
    # E[-log p] over sampled tokens is the policy's entropy a token, estimated from the very samples.
    means.add("policy/entropy", -sum(rollout.logp), len(rollout.logp))


def _describe_rewards(relevance_PGK: Tensor, reward_PGK: Tensor, scored_PGU: Tensor, means: Means) -> None:
    P, G, K = reward_PGK.shape
    means.add("reward/mean", reward_PGK.sum(), P * G * K)
    means.add("list/hit_frac", (relevance_PGK.sum(2) > 0).sum(), P * G)
    means.add("list/hits_mean", relevance_PGK.sum(), P * G)
    # A cell whose G rewards are equal has no advantage, so it teaches nothing.
    flat_PU = scored_PGU.amin(1) == scored_PGU.amax(1)
    means.add("reward/zero_std_frac", flat_PU.sum(), flat_PU.numel())
    for rank in range(K):
        means.add(f"reward/rank_{rank:02d}", reward_PGK[:, :, rank].sum(), P * G)
        if flat_PU.shape[1] == K:
            means.add(f"reward/zero_std_rank_{rank:02d}", flat_PU[:, rank].sum(), P)
