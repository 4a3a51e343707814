"""Which recommended items are right, and what each rank earns for it (paper: "Rank-GRPO", arXiv 2510.20150, Eq. 8-9).

Positions are kept in place: a line that is wrong, unparsed or not in the catalog earns 0 and keeps its rank. Penalties
for short and overlong lists are no rewards here: they are units with their own advantage, see `rankgrpo.units`.
"""

# Shape letters: B lists, K ranks.

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rankgrpo.items.catalog import Catalog
    from rankgrpo.parse import ListedItem

ReturnKind = Literal["exp_inf", "exp", "log"]


def relevance(
    items: Sequence[ListedItem],
    groundtruth: Iterable[tuple[str, int | None]],
    *,
    catalog: Catalog,
    seen: Iterable[str],
    num_ranks: int,
    year_tolerance: int = 0,
    gains: Sequence[float] | None = None,
) -> Tensor:
    """rel_k: the gain of item k where it is in the ground truth and no earlier item is the same, else 0. Float32, (K,).

    Items and ground truth are compared as catalog items, so spelling variants that the catalog unites are one item and
    nothing outside it can be right. The ground truth is a set: an entry given twice can be hit once.

    Seen titles come without a year and bar every item of that title, with one exception: where the catalog has several
    items of the title, the one that the ground truth names by its exact year counts (a remake of what was seen).

    Args:
      items: the parsed lines; those past `num_ranks` are ignored.
      groundtruth: (title, year) pairs; (line, None) where the catalog's items have no years.
      seen: titles already mentioned in the conversation.
      gains: what each entry of the ground truth is worth, 1 each by default. Entries that are one catalog item are
        worth the highest of theirs.
      year_tolerance: years by which an item, or a ground-truth entry, may differ from the catalog.

    Raises ValueError for num_ranks < 1 (and `Catalog.lookup` for a year that is not an int).
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be >= 1, got {num_ranks}")
    groundtruth = tuple(groundtruth)
    exact = {catalog.lookup(title, year) for title, year in groundtruth}
    wanted: dict[int, float] = {}
    for (title, year), gain in zip(groundtruth, gains or (1.0,) * len(groundtruth), strict=True):
        index = catalog.lookup(title, year, year_tolerance=year_tolerance)
        if index is not None:
            wanted[index] = max(gain, wanted.get(index, 0.0))
    for title in seen:
        same_title = set(catalog.title_indices(title))
        for index in same_title - exact if len(same_title) > 1 else same_title:
            wanted.pop(index, None)

    has_years = catalog.item_format.is_film
    relevance_K = torch.zeros(num_ranks)
    for rank, item in enumerate(items[:num_ranks]):
        if item.title is None or (has_years and item.year is None):
            continue
        index = catalog.lookup(item.title, item.year, year_tolerance=year_tolerance)
        if index in wanted:
            relevance_K[rank] = wanted.pop(index)  # a repeat at a later rank earns 0
    return relevance_K


def rank_returns(relevance_BK: Tensor, kind: ReturnKind = "exp_inf", gamma: float | None = None) -> Tensor:
    """Return r(x, y^(k)) of every rank, (B, K): what the tokens of rank k can still influence (Eq. 8 and 9).

    "log":     sum over j >= k of rel_j / log2(j + 1), j counted from 1 at the top of the list, not from k (DCG@k:K)
    "exp":     sum over j >= k of rel_j / gamma^(j - k) = rel_k + r_{k+1} / gamma
    "exp_inf": rel_k, the limit of "exp" for gamma to infinity

    Raises ValueError for an unknown kind, a wrong shape or dtype, "exp" without gamma > 0, gamma with another kind.
    """
    _check_relevance(relevance_BK)
    if kind not in ("exp_inf", "exp", "log"):
        raise ValueError(f"kind must be 'exp_inf', 'exp' or 'log', got {kind!r}")
    if kind == "exp" and (gamma is None or not gamma > 0):
        raise ValueError(f"kind='exp' needs gamma > 0 (math.inf is the same as 'exp_inf'), got {gamma}")
    if kind != "exp" and gamma is not None:
        raise ValueError(f"gamma belongs to kind='exp'; kind={kind!r} takes none, got {gamma}")
    if kind == "exp_inf" or gamma == math.inf:
        return relevance_BK.clone()
    if kind == "log":
        discounts_K = dcg_discounts(relevance_BK.shape[1]).to(relevance_BK)
        return (relevance_BK * discounts_K).flip(1).cumsum(1).flip(1)
    # A loop over ranks, not a matrix product: equal rows must stay equal to the last bit for `group_advantage`.
    returns_K = list(relevance_BK.unbind(1))
    for rank in reversed(range(len(returns_K) - 1)):
        returns_K[rank] = returns_K[rank] + returns_K[rank + 1] / gamma
    return torch.stack(returns_K, dim=1)


def list_return(relevance_BK: Tensor) -> Tensor:
    """DCG@K = sum over k of rel_k / log2(k + 1), (B,): the reward of a whole list, for GRPO and GSPO (Eq. 3)."""
    return rank_returns(relevance_BK, kind="log")[:, 0]


def unlikeliness_reward(reward_PGK: Tensor, logp_PGK: Tensor, coef: float, *, among_hits: bool) -> Tensor:
    """Rewards cut the more, the likelier the policy found what earned them (arXiv 2506.02355), (P, G, K).

    r'_i = r_i (1 - coef (n - place_i) / n), place 0 the likeliest of the n that are compared: all G lists of the group,
    as published, or with among_hits only those that earned something at that rank. Equal log-probs share their places.

    Args:
      reward_PGK: returns of the ranks, or K = 1 for whole lists. 0 stays 0.
      logp_PGK: mean token log-prob under the policy that sampled, of the rank's item or of the whole list.
      coef: 0 changes nothing; the paper has 0.25.

    Raises ValueError for different shapes and for coef outside [0, 1).
    """
    if reward_PGK.shape != logp_PGK.shape or reward_PGK.ndim != 3:
        shapes = f"{tuple(reward_PGK.shape)} and {tuple(logp_PGK.shape)}"
        raise ValueError(f"reward_PGK and logp_PGK must both be (P, G, K), got {shapes}")
    if not 0 <= coef < 1:
        raise ValueError(f"coef must be in [0, 1), got {coef}")
    compared_PGK = reward_PGK != 0 if among_hits else torch.ones_like(reward_PGK, dtype=torch.bool)
    own_PG1K, other_P1GK = logp_PGK[:, :, None], logp_PGK[:, None]
    ahead_PGGK = (other_P1GK > own_PG1K).double() + 0.5 * (other_P1GK == own_PG1K).double()
    place_PGK = (ahead_PGGK * compared_PGK[:, None]).sum(2) - 0.5  # every value equals itself once
    num_P1K = compared_PGK.sum(1, keepdim=True).clamp(min=1)
    factor_PGK = 1 - coef * (num_P1K - place_PGK) / num_P1K
    return torch.where(reward_PGK != 0, reward_PGK * factor_PGK.to(reward_PGK.dtype), reward_PGK)


def dcg_discounts(num_ranks: int) -> Tensor:
    """1 / log2(k + 1) for k = 1..K, float64 (K,)."""
    return 1.0 / torch.arange(2, num_ranks + 2, dtype=torch.float64).log2()


def _check_relevance(relevance_BK: Tensor) -> None:
    if relevance_BK.ndim != 2 or relevance_BK.shape[1] == 0:
        raise ValueError(f"relevance_BK must have shape (B, K) with K >= 1, got {tuple(relevance_BK.shape)}")
    if not relevance_BK.is_floating_point():
        raise ValueError(f"relevance_BK must be floating point, got {relevance_BK.dtype}")
