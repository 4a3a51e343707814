"""The popularity list: for everybody the items most often right in training."""

# Shape letters: N catalog items.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from rankgrpo.data.candidates import excluded_items
from rankgrpo.data.dialogs import groundtruth_items
from rankgrpo.data.samples import Sample
from rankgrpo.items.catalog import Catalog


def popularity_counts(samples: Iterable[Sample], catalog: Catalog) -> Tensor:
    """How many samples hold each item in their ground truth, float32 (N,)."""
    found = [index for sample in samples for index in groundtruth_items(sample, catalog)]
    return torch.tensor(found, dtype=torch.long).bincount(minlength=len(catalog)).float()


def popularity_order(popularity_N: Tensor) -> Tensor:
    """The items from the most to the least popular, equal ones in catalog order."""
    return popularity_N.sort(descending=True, stable=True).indices


def popularity_lists(
    train: Sequence[Sample], samples: Sequence[Sample], catalog: Catalog, *, num_items: int = 20
) -> list[list[int]]:
    """The baseline: for everybody the items most often right in `train`, without those the conversation named.

    Returns catalog indices, best first; items of equal count come in catalog order.
    """
    order = popularity_order(popularity_counts(train, catalog)).tolist()
    lists = []
    for sample in samples:
        named = set(excluded_items(sample, catalog))
        lists.append(list(islice((index for index in order if index not in named), num_items)))
    return lists
