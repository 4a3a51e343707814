"""Remap: a teacher's list, whatever it names, as scores over the catalog (arXiv 2510.20150, Eq. 10).

    s_remap = p (item_weight S + I_ic) + context_weight * s_context

p has 1 / sqrt(k) at what the teacher listed at rank k; S holds the cosines of listed items and catalog items, by their
texts; I_ic has 1 where a listed item is that catalog item; s_context are the cosines of the conversation and the
catalog items. The paper has item_weight 1 and context_weight (its lambda) 1.

S has a column an item and a row a title that some list names, and is never built: p S = (p E) E' with E the unit rows
of the texts, so a block of conversations costs one product with the catalog and memory for its own scores.
"""

# Shape letters: S samples, B samples of a block, N catalog items, U items that lists can name (the catalog's come
# first, then those it lacks), C of them that a block names, D embedding dimensions, K ranks.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from rankgrpo.baselines.ranking import best_items
from rankgrpo.distill.embed import products, weighted_rows

BLOCK_SCORES = 1 << 23
"""Scores held at once: 32 MiB in float32, and top-k takes a few times that."""


class Scores(Protocol):
    """Scores of every catalog item for every sample, made a block of samples at a time."""

    num_samples: int
    num_items: int

    def block(self, samples: Sequence[int]) -> Tensor:
        """Scores of a block of samples, float32 (B, N), in a tensor of the caller's own."""
        ...


@dataclass(frozen=True)
class RemapScores:
    """s_remap of samples whose teacher lists are given."""

    lists: Sequence[Sequence[int]]
    """Items by sample, best first, as rows of `item_UD`; those below `num_items` are catalog items."""
    num_items: int
    item_UD: Tensor | None = None
    """Unit rows of the items' texts; None leaves p I_ic alone, the teacher's list without what the catalog lacks."""
    context_SD: Tensor | None = None
    item_weight: float = 1.0
    context_weight: float = 1.0

    @property
    def num_samples(self) -> int:
        return len(self.lists)

    def block(self, samples: Sequence[int]) -> Tensor:
        """Scores of a block of samples, float32 (B, N)."""
        listed = sorted({item for sample in samples for item in self.lists[sample]})
        column = {item: place for place, item in enumerate(listed)}
        places: dict[tuple[int, int], float] = {}
        for row, sample in enumerate(samples):
            for rank, item in enumerate(self.lists[sample]):
                places.setdefault((row, column[item]), (rank + 1) ** -0.5)  # a repeat counts at its best rank
        position_BC = torch.zeros(len(samples), len(listed))
        if places:
            position_BC[tuple(zip(*places, strict=True))] = torch.tensor(list(places.values()))
        in_catalog = [place for place, item in enumerate(listed) if item < self.num_items]
        exact_BN = torch.zeros(len(samples), self.num_items)
        exact_BN[:, [listed[place] for place in in_catalog]] = position_BC[:, in_catalog]
        if self.item_UD is None or self.context_SD is None:
            return exact_BN
        item_CD = self.item_UD.index_select(0, torch.tensor(listed, dtype=torch.long))
        context_BD = self.context_SD.index_select(0, torch.tensor(samples, dtype=torch.long))
        query_BD = self.item_weight * weighted_rows(position_BC, item_CD) + self.context_weight * context_BD
        return exact_BN + products(query_BD, self._catalog_ND)

    @cached_property
    def _catalog_ND(self) -> Tensor:
        assert self.item_UD is not None
        if not self.item_UD.is_sparse:
            return self.item_UD[: self.num_items]
        return self.item_UD.index_select(0, torch.arange(self.num_items)).coalesce()


@dataclass(frozen=True)
class SelectedScores:
    """The scores of some samples, which are numbered 0, 1, ... here."""

    scores: Scores
    samples: Sequence[int]

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def num_items(self) -> int:
        return self.scores.num_items

    def block(self, samples: Sequence[int]) -> Tensor:
        """Scores of a block of samples, float32 (B, N)."""
        return self.scores.block([self.samples[sample] for sample in samples])


@dataclass(frozen=True)
class HeldScores:
    """Scores computed once and kept, for whoever goes through them many times."""

    scores_SN: Tensor

    @property
    def num_samples(self) -> int:
        return self.scores_SN.shape[0]

    @property
    def num_items(self) -> int:
        return self.scores_SN.shape[1]

    @classmethod
    def hold(cls, scores: Scores) -> HeldScores:
        """All scores, block by block."""
        held_SN = torch.empty(scores.num_samples, scores.num_items)
        for block in blocks(range(scores.num_samples), scores.num_items):
            held_SN[list(block)] = scores.block(block)
        return cls(held_SN)

    def block(self, samples: Sequence[int]) -> Tensor:
        """Scores of a block of samples, float32 (B, N)."""
        return self.scores_SN[list(samples)]


def blocks(samples: Sequence[int], num_items: int) -> Iterator[Sequence[int]]:
    """Runs of samples whose scores are at most BLOCK_SCORES numbers (but at least one sample)."""
    size = max(BLOCK_SCORES // num_items, 1)
    return (samples[start : start + size] for start in range(0, len(samples), size))


def rank_samples(
    scores: Scores,
    samples: Sequence[int],
    excluded: Sequence[Sequence[int]],
    order_N: Tensor,
    num_items: int,
    *,
    adjust: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
    title: str | None = None,
) -> list[list[int]]:
    """The best items of each of `samples`, without what is excluded for it; equal scores go by `order_N`.

    `adjust(scores_BN, block)` may change a block's scores before they are ranked.
    """
    lists: list[list[int]] = []
    with tqdm(total=len(samples), desc=title, unit="list", disable=title is None, dynamic_ncols=True) as bar:
        for block in blocks(samples, scores.num_items):
            scores_BN = scores.block(block)
            if adjust is not None:
                scores_BN = adjust(scores_BN, block)
            lists += best_items(scores_BN, [excluded[sample] for sample in block], order_N, num_items)
            bar.update(len(block))
    return lists
