"""The films of the demo, their facts, and users whose tastes are weights on those facts. See `rankgrpo.data.demo`."""

# Shape letters: N films, F facts.

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from rankgrpo.data.demo.words import MOODS
from rankgrpo.data.samples import SPLITS

T = TypeVar("T")

CATALOG_PATH = Path(__file__).with_name("catalog.jsonl")

# The constants of the world. With 3,000 training users they give an NDCG@20 of .13 to the popularity list, .24 to EASE,
# .35 to ridge regression on the words and titles of the conversation, and .60 to the oracle that knows the tastes.
TASTE_SCALE = 2.5
FAME_BIAS = 3.5
TASTE_NOISE = 0.1  # half the width of the uniform noise on every weight
SEED_FAME_BIAS = 3.0  # how much tastes form around famous films
SWITCH = 0.08  # chance that the next liked fact comes from another film
DISLIKE = 0.5
KIND_WEIGHTS = {"genre": 4.0, "keyword": 1.0, "director": 0.4, "decade": 0.2}
MENTIONS = (1, 2, 2, 3, 3, 4)  # films mentioned, drawn uniformly from these
GROUNDTRUTH = (3, 10)  # fewest and most


@dataclass(frozen=True, slots=True)
class Film:
    """One row of the catalog file. Example: Film("Stalker", 1979, "Andrei Tarkovsky", ("Drama",), ("eerie",), 46)"""

    title: str
    year: int
    director: str
    genres: tuple[str, ...]
    keywords: tuple[str, ...]
    fame: int
    """1..100, how widely known the film is: an estimate by hand, no measurement."""


@dataclass(frozen=True, slots=True)
class Fact:
    """Something films share. Example: Fact("keyword", "time travel"), Fact("decade", "1970")"""

    kind: str
    """ "genre", "keyword", "director" or "decade"."""
    value: str


@dataclass(frozen=True)
class World:
    """The films, and which of the facts each of them has."""

    films: tuple[Film, ...]
    facts: tuple[Fact, ...]
    has_NF: np.ndarray
    liking_F: np.ndarray
    """How likely each fact of a film is to become a liked one."""
    disliking_F: np.ndarray
    """How likely each fact is to be disliked; only genres and moods are."""
    fame_N: np.ndarray


@dataclass(frozen=True)
class User:
    """What is hidden about a simulated user, and what the conversation may show of it. Films and facts are indices."""

    logit_N: np.ndarray
    liked: tuple[int, ...]
    disliked: int | None
    mentioned: tuple[int, ...]
    groundtruth: tuple[int, ...]
    rejected: int | None
    """A film with the disliked fact, which the assistant suggests in vain; None for users who dislike nothing."""


@lru_cache(maxsize=1)
def demo_films() -> tuple[Film, ...]:
    """The films of the demo with their facts, in the order of the catalog."""
    films = []
    for line in CATALOG_PATH.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        films.append(Film(**row | {"genres": tuple(row["genres"]), "keywords": tuple(row["keywords"])}))
    return tuple(films)


@lru_cache(maxsize=1)
def _titles_of_several() -> frozenset[str]:
    count = Counter(film.title for film in demo_films())
    return frozenset(title for title in count if count[title] > 1)


def seen_title(film: Film) -> str:
    """The title, with the year where remakes share it."""
    return f"{film.title} ({film.year})" if film.title in _titles_of_several() else film.title


@lru_cache(maxsize=1)
def demo_world() -> World:
    films = demo_films()
    facts_of = [
        [
            *(Fact("genre", genre) for genre in film.genres),
            *(Fact("keyword", keyword) for keyword in film.keywords),
            Fact("director", film.director),
            Fact("decade", str(film.year // 10 * 10)),
        ]
        for film in films
    ]
    count = Counter(fact for facts in facts_of for fact in facts)
    facts = tuple(fact for fact in count if count[fact] > 1)
    has_NF = np.array([[fact in of_film for fact in facts] for of_film in map(set, facts_of)], dtype=np.float64)
    rarity_F = np.log(len(films) / has_NF.sum(0))
    liking_F = np.array([KIND_WEIGHTS[fact.kind] for fact in facts]) * np.sqrt(rarity_F)
    disliking_F = np.array([fact.kind == "genre" or fact.value in MOODS for fact in facts]) * np.sqrt(has_NF.sum(0))
    fame_N = np.array([film.fame for film in films], dtype=np.float64)
    return World(films, facts, has_NF, liking_F, disliking_F, fame_N)


def user_rng(seed: int, split: str, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))))


def draw(rng: np.random.Generator, weights: np.ndarray) -> int:
    """An index with probability proportional to its weight."""
    cumulated = np.cumsum(weights)
    return int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.random() * len(choices))]


def shuffled(rng: np.random.Generator, values: Sequence[T]) -> list[T]:
    return [values[place] for place in np.argsort(rng.random(len(values)))]


def draw_user(world: World, rng: np.random.Generator) -> User:
    weights_F = TASTE_NOISE * (2 * rng.random(len(world.facts)) - 1)
    liked = _draw_liked_facts(world, rng)
    for fact in liked:
        weights_F[fact] += 0.8 + 0.4 * rng.random()
    disliked = _draw_disliked_fact(world, rng, liked) if rng.random() < DISLIKE else None
    if disliked is not None:
        weights_F[disliked] -= 1.0
    logit_N = TASTE_SCALE * (world.has_NF @ weights_F) + FAME_BIAS * np.log(world.fame_N)

    # The largest logits plus Gumbel noise are a draw without replacement from softmax(logit).
    gumbel_N = -np.log(-np.log(rng.random(len(world.films))))
    num_mentions = pick(rng, MENTIONS)
    num_groundtruth = pick(rng, range(GROUNDTRUTH[0], GROUNDTRUTH[1] + 1))
    films: dict[str, int] = {}  # by title: of two films with the same title a user likes one
    for film in np.argsort(-(logit_N + gumbel_N), kind="stable").tolist():
        films.setdefault(world.films[film].title, film)
        if len(films) == num_mentions + num_groundtruth:
            break
    chosen = shuffled(rng, list(films.values()))
    rejected = None
    if disliked is not None:
        has_liked_N = world.has_NF[:, liked].any(1)
        candidate_N = world.has_NF[:, disliked] * ~has_liked_N
        candidate_N[[n for n in np.flatnonzero(candidate_N) if world.films[n].title in films]] = 0.0
        rejected = draw(rng, candidate_N * world.fame_N) if candidate_N.any() else None
    return User(logit_N, liked, disliked, tuple(chosen[:num_mentions]), tuple(chosen[num_mentions:]), rejected)


def _draw_liked_facts(world: World, rng: np.random.Generator) -> tuple[int, ...]:
    """2 to 4 facts, most of them of one film, so that they go together."""
    seed_N = world.fame_N**SEED_FAME_BIAS
    liked: list[int] = []
    num_facts = pick(rng, (2, 3, 4))
    film = draw(rng, seed_N)
    while len(liked) < num_facts:
        weights_F = world.liking_F * world.has_NF[film]
        weights_F[liked] = 0.0
        if weights_F.any():
            liked.append(draw(rng, weights_F))
        if not weights_F.any() or rng.random() < SWITCH:
            film = draw(rng, seed_N)
    return tuple(liked)


def _draw_disliked_fact(world: World, rng: np.random.Generator, liked: Sequence[int]) -> int:
    """A genre or a mood that seldom goes with the liked facts: nobody who wants ghost stories rules out horror."""
    shared_F = world.has_NF[world.has_NF[:, liked].any(1)].sum(0) / world.has_NF.sum(0)
    return draw(rng, world.disliking_F * (1 - shared_F) ** 4)  # a liked fact shares all its films
