"""Short requests: more demonstrations from the same dialogs, for models that start from nothing.

A dialog teaches which items go together, but a small model first has to find their titles among the small talk. A short
request names a few items and nothing else, and the teacher answers it like any conversation; it costs half the tokens
of a real one. Real conversations stay in the mix, so the model still learns to read them.

The items are those of a dialog, each exchanged with probability 1/2 for one that the teacher finds similar. Dialogs are
few, and a model that meets the same few sets of items over and over learns their lists by heart: what it is to learn is
the teacher's answer to any set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from rankgrpo.data.dialogs import named_items
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.distill.demonstrations import Teacher, make_demonstrations
from rankgrpo.items.catalog import Catalog

MAX_NAMED = 5
EXCHANGED = 0.5
REQUESTS = (
    "I like {}",
    "I loved {}",
    "Can you recommend something like {}?",
    "I enjoyed {}. Anything similar?",
    "My favorites are {}",
    "I have seen {}",
)


def short_demonstrations(
    samples: Sequence[Sample], teacher: Teacher, catalog: Catalog, *, num_variants: int, num_items: int = 20, seed: int
) -> list[Sample]:
    """`short_requests` that the teacher answered, under their own ids."""
    demonstrations = []
    for variant, requests in enumerate(
        short_requests(samples, teacher, catalog, num_variants=num_variants, num_items=num_items, seed=seed)
    ):
        answered = make_demonstrations(requests, teacher, num_items=num_items)
        demonstrations += [replace(sample, id=request_id(sample, variant)) for sample in answered]
    return demonstrations


def short_requests(
    samples: Sequence[Sample], teacher: Teacher, catalog: Catalog, *, num_variants: int, num_items: int = 20, seed: int
) -> list[list[Sample]]:
    """`num_variants` rounds of one short request a sample; a function of `seed`.

    Each names 1 to 5 items: some that its sample names or holds as ground truth, some that the teacher lists for those.
    It keeps the id of its sample, so that a cross-fitted teacher leaves the sample's dialog out; `request_id` is the id
    of its own. Samples without catalog items give none, nor do those that bring candidates.
    """
    items_of = [[] if sample.candidates else _items(sample, catalog) for sample in samples]
    similar = (
        similar_items({index for items in items_of for index in items}, teacher, num_items) if num_variants else {}
    )
    rounds = []
    for variant in range(num_variants):
        rng = np.random.default_rng([seed, variant])
        requests = []
        for sample, items in zip(samples, items_of, strict=True):
            if items:
                chosen = rng.permutation(items)[: rng.integers(1, min(MAX_NAMED, len(items)) + 1)].tolist()
                exchanged = [rng.choice(similar[index]) if rng.random() < EXCHANGED else index for index in chosen]
                requests.append(_request(sample, list(dict.fromkeys(exchanged)), catalog, rng))
        rounds.append(requests)
    return rounds


def request_id(sample: Sample, variant: int) -> str:
    """The id of a sample's short request."""
    return f"{sample.id}+{variant}"


def similar_items(items: Iterable[int], teacher: Teacher, num_items: int) -> dict[int, list[int]]:
    """For each item what the teacher lists for a request that names it alone."""
    items = sorted(items)
    requests = []
    for index in items:
        item = teacher.catalog.items[index]
        requests.append(Sample(f"similar to {index}", (Turn("user", item.line),), (item.title,), ()))
    return dict(zip(items, teacher.rank_all(requests, num_items=num_items), strict=True))


def _items(sample: Sample, catalog: Catalog) -> list[int]:
    wanted = (catalog.lookup(title, year) for title, year in sample.groundtruth)
    return list(dict.fromkeys([*named_items(sample, catalog), *(index for index in wanted if index is not None)]))


def _request(sample: Sample, items: Sequence[int], catalog: Catalog, rng: np.random.Generator) -> Sample:
    named = [catalog.items[index] for index in items]
    *others, last = [item.line for item in named]
    text = f"{', '.join(others)} and {last}" if others else last
    request = REQUESTS[rng.integers(len(REQUESTS))].format(text)
    seen_titles = tuple(item.title for item in named)
    return replace(sample, conversation=(Turn("user", request),), seen_titles=seen_titles)
