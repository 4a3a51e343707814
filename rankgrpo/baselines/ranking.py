"""The best items of each row of scores, with a fixed order among equals."""

# Shape letters: S samples, N catalog items, K ranks.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def best_items(
    scores_SN: Tensor, excluded: Sequence[Sequence[int]], order_N: Tensor, num_items: int
) -> list[list[int]]:
    """The `num_items` best items of each row, best first; equal scores go by their place in `order_N`.

    `order_N` is a permutation of the items, the preferred ones first. Excluded items, and items of score -inf, are left
    out, so a list may be shorter; their scores are overwritten. Raises ValueError for num_items < 1.
    """
    if num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}")
    for scores_N, items in zip(scores_SN, excluded, strict=True):
        scores_N[list(items)] = -torch.inf
    ordered_SN = scores_SN[:, order_N]
    num_items = min(num_items, ordered_SN.shape[1])
    values_SK, place_SK = ordered_SN.topk(num_items, dim=1)
    # topk takes any of the items that are equal at the end of the list: such rows are sorted whole.
    crowded_S = (ordered_SN >= values_SK[:, -1:]).sum(1) > num_items
    if crowded_S.any():
        place_SK[crowded_S] = ordered_SN[crowded_S].sort(descending=True, stable=True).indices[:, :num_items]
    place_SK = place_SK.sort(dim=1).values
    values_SK, rank_SK = ordered_SN.gather(1, place_SK).sort(descending=True, stable=True)
    index_SK = order_N[place_SK.gather(1, rank_SK)]
    return [index_K[values_K > -torch.inf].tolist() for index_K, values_K in zip(index_SK, values_SK, strict=True)]
