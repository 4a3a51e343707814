"""Demonstrations: samples with the list that a teacher gives each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from rankgrpo.data.candidates import best_order
from rankgrpo.data.samples import Sample
from rankgrpo.items.catalog import Catalog


class Teacher(Protocol):
    """What `make_demonstrations` needs of a teacher."""

    catalog: Catalog

    def rank_all(self, samples: Sequence[Sample], *, num_items: int = 20) -> list[list[int]]:
        """Catalog indices for every sample, best first."""
        ...


def make_demonstrations(samples: Sequence[Sample], teacher: Teacher, *, num_items: int = 20) -> list[Sample]:
    """The samples with the teacher's lists as completions: lines of items, no trailing newline.

    A sample that brings candidates has them in the order of what they are worth: the teacher knows nothing of a
    passage, and the samples say which ones are right.
    """
    items = teacher.catalog.items
    lists = teacher.rank_all(samples, num_items=num_items)
    for place, sample in enumerate(samples):
        if sample.candidates:
            lists[place] = best_order(sample, teacher.catalog)[:num_items]
    texts = ("\n".join(items[index].line for index in indices) for indices in lists)
    return [replace(sample, completion=text) for sample, text in zip(samples, texts, strict=True)]
