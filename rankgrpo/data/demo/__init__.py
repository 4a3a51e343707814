"""The built-in demo: a simulated world. The films and their facts are real; the users and their conversations are not.

Facts are a film's genres, keywords, director and decade; facts of a single film are left out. A simulated user has a
hidden taste, a weight for every fact: 2 to 4 liked facts, in half of the users a disliked one, and a little noise. With
x_n the 0/1 facts of film n, the user's log-odds for it are

    logit_n = TASTE_SCALE * (x_n . weights) + FAME_BIAS * log(fame_n)

and the liked films are drawn without replacement from softmax(logit). Some of them are mentioned in the conversation,
which also states part of the taste in words; the others are the ground truth. So a model can learn what to recommend
from the words and from the company that films keep, while nothing in the text names a film of the ground truth.

User i of a split depends on (seed, split, i) alone: a larger data set begins with the smaller one. Only `rng.random` is
drawn from, because numpy keeps the stream of a bit generator across versions, and not that of its other methods.

Nothing here was said by a person, and no result on this data says how a recommender fares with people.
"""

# Shape letters: N films.

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rankgrpo.data.demo.talk import converse
from rankgrpo.data.demo.world import Film, demo_films, demo_world, draw_user, seen_title, user_rng
from rankgrpo.data.samples import SPLITS, Dataset, Sample, write_samples
from rankgrpo.items.catalog import Catalog, Item

__all__ = [
    "Film",
    "demo_catalog",
    "demo_films",
    "make_demo",
    "make_sample",
    "oracle_lists",
    "oracle_scores",
    "write_demo",
]


def demo_catalog() -> Catalog:
    """The catalog of the demo; popularity is 0 until `make_demo` counts it. Director and keywords are in the text."""
    return Catalog(
        Item(film.title, film.year, genres=film.genres, text=f"directed by {film.director}; {', '.join(film.keywords)}")
        for film in demo_films()
    )


def make_demo(num_train: int = 4000, num_validation: int = 200, num_test: int = 500, seed: int = 0) -> Dataset:
    """Simulate the users and their conversations. Popularity in the catalog counts the training ground truth.

    The same arguments give the same data, and user i of a split is the same in a larger data set. Ids read
    `demo_<seed>_<split>_<i>`. Raises ValueError for a negative seed or size.
    """
    sizes = dict(zip(SPLITS, (num_train, num_validation, num_test), strict=True))
    if seed < 0 or min(sizes.values()) < 0:
        raise ValueError(f"seed and sizes must be >= 0, got seed {seed} and {sizes}")
    splits = {name: [make_sample(seed, name, index) for index in range(size)] for name, size in sizes.items()}
    count = Counter(entry for sample in splits["train"] for entry in sample.groundtruth)
    items = [replace(item, popularity=count[item.title, item.year]) for item in demo_catalog()]
    return Dataset("demo", **splits, catalog=Catalog(items))


def write_demo(
    folder: str | os.PathLike[str],
    num_train: int = 4000,
    num_validation: int = 200,
    num_test: int = 500,
    seed: int = 0,
) -> None:
    """Write `make_demo` as a data set folder (three splits and the catalog, as JSONL); existing files are replaced."""
    dataset = make_demo(num_train, num_validation, num_test, seed)
    for name in SPLITS:
        write_samples(Path(folder) / f"{name}.jsonl", dataset.split(name))
    dataset.catalog.to_jsonl(Path(folder) / "catalog.jsonl")


def oracle_scores(sample: Sample) -> np.ndarray:
    """The hidden log-odds of every catalog item for the user of a demo sample, (N,); seen items are -inf.

    Recommending by these scores is the best any model can do here. The taste is simulated anew from the sample's id, so
    samples read from files are fine. Raises ValueError for an id that is not of the demo.
    """
    match = re.fullmatch(rf"demo_(\d+)_({'|'.join(SPLITS)})_(\d+)", sample.id)
    if match is None:
        raise ValueError(
            f"only users of the demo have a known taste: expected an id like demo_0_test_7, got {sample.id!r}"
        )
    user = draw_user(demo_world(), user_rng(int(match[1]), match[2], int(match[3])))
    seen_N = np.array([seen_title(film) in sample.seen_titles for film in demo_films()])
    return np.where(seen_N, -np.inf, user.logit_N)


def oracle_lists(samples: Sequence[Sample], *, num_items: int = 20) -> list[list[int]]:
    """Catalog indices by falling `oracle_scores` for every sample: what an all-knowing recommender would list."""
    return [np.argsort(-oracle_scores(sample), kind="stable")[:num_items].tolist() for sample in samples]


def make_sample(seed: int, split: str, index: int) -> Sample:
    """User `index` of a split: the conversation, the films mentioned in it, and the ground truth."""
    world, rng = demo_world(), user_rng(seed, split, index)
    user = draw_user(world, rng)
    conversation, seen = converse(rng, world, user)
    return Sample(
        id=f"demo_{seed}_{split}_{index}",
        conversation=conversation,
        seen_titles=tuple(seen_title(world.films[film]) for film in seen),
        groundtruth=tuple((world.films[film].title, world.films[film].year) for film in user.groundtruth),
    )
