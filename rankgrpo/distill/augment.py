"""Short requests: more demonstrations from the same dialogs, for models that start from nothing.

A dialog teaches which items go together, but a small model first has to find their titles among the small talk. A short
request names a few of a dialog's items and nothing else, and the teacher answers it like any conversation; it costs
half the tokens of a real one. Real conversations stay in the mix, so the model still learns to read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rankgrpo.catalog import Catalog
from rankgrpo.data import Sample, Turn
from rankgrpo.distill.teacher import Teacher, make_demonstrations, named_items

MAX_NAMED = 5
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
    """`num_variants` answered short requests a sample, with ids `<id>+0`, `<id>+1`, ...; a function of `seed`.

    Each names 1 to 5 of the items that its sample names or holds as ground truth. The teacher sees the sample's own id,
    so a cross-fitted one leaves the sample's dialog out. Samples without catalog items give none.
    """
    demonstrations = []
    for variant in range(num_variants):
        rng = np.random.default_rng([seed, variant])
        requests = [request for sample in samples if (request := _request(sample, catalog, rng)) is not None]
        answered = make_demonstrations(requests, teacher, num_items=num_items)
        demonstrations += [replace(sample, id=f"{sample.id}+{variant}") for sample in answered]
    return demonstrations


def _request(sample: Sample, catalog: Catalog, rng: np.random.Generator) -> Sample | None:
    wanted = (catalog.lookup(title, year) for title, year in sample.groundtruth)
    items = list(dict.fromkeys([*named_items(sample, catalog), *(index for index in wanted if index is not None)]))
    if not items:
        return None
    rng.shuffle(items)
    named = [catalog.items[index] for index in items[: rng.integers(1, min(MAX_NAMED, len(items)) + 1)]]
    *others, last = [f"{item.title} ({item.year})" for item in named]
    text = f"{', '.join(others)} and {last}" if others else last
    request = REQUESTS[rng.integers(len(REQUESTS))].format(text)
    seen_titles = tuple(item.title for item in named)
    return replace(sample, conversation=(Turn("user", request),), seen_titles=seen_titles)
