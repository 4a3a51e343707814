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

# Shape letters: N films, F facts.

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from rankgrpo.catalog import Catalog, Item
from rankgrpo.data import SPLITS, Dataset, Sample, Turn, write_samples

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

T = TypeVar("T")

CATALOG_PATH = Path(__file__).with_name("demo_catalog.jsonl")

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
STATED = 0.8  # chance that a liked fact is put into words


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


# ----------------------------------------------------------------------------------------------------------------------
# Public


@lru_cache(maxsize=1)
def demo_films() -> tuple[Film, ...]:
    """The films of the demo with their facts, in the order of the catalog."""
    films = []
    for line in CATALOG_PATH.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        films.append(Film(**row | {"genres": tuple(row["genres"]), "keywords": tuple(row["keywords"])}))
    return tuple(films)


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
    user = _draw_user(_world(), _rng(int(match[1]), match[2], int(match[3])))
    seen_N = np.array([_seen_title(film) in sample.seen_titles for film in demo_films()])
    return np.where(seen_N, -np.inf, user.logit_N)


def oracle_lists(samples: Sequence[Sample], *, num_items: int = 20) -> list[list[int]]:
    """Catalog indices by falling `oracle_scores` for every sample: what an all-knowing recommender would list."""
    return [np.argsort(-oracle_scores(sample), kind="stable")[:num_items].tolist() for sample in samples]


def make_sample(seed: int, split: str, index: int) -> Sample:
    """User `index` of a split: the conversation, the films mentioned in it, and the ground truth."""
    world, rng = _world(), _rng(seed, split, index)
    user = _draw_user(world, rng)
    conversation, seen = _converse(rng, world, user)
    return Sample(
        id=f"demo_{seed}_{split}_{index}",
        conversation=conversation,
        seen_titles=tuple(_seen_title(world.films[film]) for film in seen),
        groundtruth=tuple((world.films[film].title, world.films[film].year) for film in user.groundtruth),
    )


# ----------------------------------------------------------------------------------------------------------------------
# The world and its users


@lru_cache(maxsize=1)
def _world() -> World:
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


def _rng(seed: int, split: str, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))))


def _draw(rng: np.random.Generator, weights: np.ndarray) -> int:
    """An index with probability proportional to its weight."""
    cumulated = np.cumsum(weights)
    return int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.random() * len(choices))]


def _shuffled(rng: np.random.Generator, values: Sequence[T]) -> list[T]:
    return [values[place] for place in np.argsort(rng.random(len(values)))]


def _draw_user(world: World, rng: np.random.Generator) -> User:
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
    num_mentions = _pick(rng, MENTIONS)
    num_groundtruth = _pick(rng, range(GROUNDTRUTH[0], GROUNDTRUTH[1] + 1))
    films: dict[str, int] = {}  # by title: of two films with the same title a user likes one
    for film in np.argsort(-(logit_N + gumbel_N), kind="stable").tolist():
        films.setdefault(world.films[film].title, film)
        if len(films) == num_mentions + num_groundtruth:
            break
    chosen = _shuffled(rng, list(films.values()))
    rejected = None
    if disliked is not None:
        has_liked_N = world.has_NF[:, liked].any(1)
        candidate_N = world.has_NF[:, disliked] * ~has_liked_N
        candidate_N[[n for n in np.flatnonzero(candidate_N) if world.films[n].title in films]] = 0.0
        rejected = _draw(rng, candidate_N * world.fame_N) if candidate_N.any() else None
    return User(logit_N, liked, disliked, tuple(chosen[:num_mentions]), tuple(chosen[num_mentions:]), rejected)


def _draw_liked_facts(world: World, rng: np.random.Generator) -> tuple[int, ...]:
    """2 to 4 facts, most of them of one film, so that they go together."""
    seed_N = world.fame_N**SEED_FAME_BIAS
    liked: list[int] = []
    num_facts = _pick(rng, (2, 3, 4))
    film = _draw(rng, seed_N)
    while len(liked) < num_facts:
        weights_F = world.liking_F * world.has_NF[film]
        weights_F[liked] = 0.0
        if weights_F.any():
            liked.append(_draw(rng, weights_F))
        if not weights_F.any() or rng.random() < SWITCH:
            film = _draw(rng, seed_N)
    return tuple(liked)


def _draw_disliked_fact(world: World, rng: np.random.Generator, liked: Sequence[int]) -> int:
    """A genre or a mood that seldom goes with the liked facts: nobody who wants ghost stories rules out horror."""
    shared_F = world.has_NF[world.has_NF[:, liked].any(1)].sum(0) / world.has_NF.sum(0)
    return _draw(rng, world.disliking_F * (1 - shared_F) ** 4)  # a liked fact shares all its films


# ----------------------------------------------------------------------------------------------------------------------
# What they say

# Keywords in words, by what precedes them: a mood stands before "film", the others behind it. "keyword=words" where the
# two differ; keywords that are missing here read "about <keyword>".
_KEYWORDS = """
mood: bittersweet, bleak, claustrophobic, deadpan, disturbing, dreamlike, eerie, epic, fast-paced, feel-good,
  gritty, heartwarming, melancholy, mind-bending, nostalgic, poetic, quirky, stylish, surreal, tense, violent,
  whimsical, slapstick, anti-war, black and white=black-and-white, dark humor=darkly funny, dialogue-driven=talky,
  nonlinear=non-linear, satire=satirical, silent film=silent, slow burn=slow
set in: africa=Africa, ancient world=the ancient world, australia=Australia, china=China,
  countryside=the countryside, courtroom=a courtroom, desert=the desert, dystopia=a dystopia, england=England,
  france=France, germany=Germany, haunted house=a haunted house, hong kong=Hong Kong, india=India, iran=Iran,
  italy=Italy, japan=Japan, korea=Korea, london=London, los angeles=Los Angeles, medieval=the Middle Ages,
  mexico=Mexico, new york=New York, paris=Paris, period piece=another century, prison, russia=Russia,
  san francisco=San Francisco, scandinavia=Scandinavia, scotland=Scotland, single location=one place,
  small town=a small town, space, spain=Spain, summer, wilderness=the wilderness, winter=the snow
set: christmas=at Christmas, civil war=in a civil war, cold war=in the Cold War, halloween=in late October,
  island=on an island, ocean=at sea, post-apocalypse=after the end of the world, school=at a school,
  trains=on a train, workplace=at work, world war i=in the First World War, world war ii=in the Second World War
with: aliens, animals, battles=great battles, body horror, car chases, dance=dancing, demons,
  disguise=people in disguise, femme fatale=a femme fatale, ghosts, gunfights, love triangle=a love triangle,
  mad scientist=a mad scientist, magic, martial arts, monsters, music, odd couple=an odd couple, pirates, robots,
  samurai, strong heroine=a strong heroine, superheroes, toys, treasure hunt=a treasure hunt,
  twist ending=a twist at the end, vampires, witches, zombies
based on: based on a novel=a novel, true story=a true story
about: circus=the circus, class divide=rich and poor, conspiracy=a conspiracy, detective=a detective,
  disaster=a disaster, dysfunctional family=a family falling apart, fairy tale=a fairy tale, heist=a heist,
  hitman=a hitman, holocaust=the Holocaust, kidnapping=a kidnapping, lgbtq=queer lives, nuclear war=the bomb,
  on the run=people on the run, police=the police, revolution=a revolution, road trip=a road trip,
  serial killer=a serial killer, underdog=an underdog, undercover=going undercover, vietnam=the Vietnam War,
  wrong man=an innocent man accused
"""
_DECADES = "twenties thirties forties fifties sixties seventies eighties nineties".split()
DECADES = {str(1920 + 10 * place): name for place, name in enumerate(_DECADES)}
GENRE_NOUNS = {  # one, several, as an adjective
    "Action": ("action film", "action films", "action-packed"),
    "Adventure": ("adventure film", "adventure films", "adventurous"),
    "Animation": ("animated film", "cartoons", "animated"),
    "Biography": ("biopic", "biopics", "biographical"),
    "Comedy": ("comedy", "comedies", "funny"),
    "Crime": ("crime film", "crime films", "criminal"),
    "Documentary": ("documentary", "documentaries", "documentary-style"),
    "Drama": ("drama", "dramas", "dramatic"),
    "Family": ("family film", "family films", "child-friendly"),
    "Fantasy": ("fantasy film", "fantasy films", "fantastical"),
    "Horror": ("horror film", "horror films", "scary"),
    "Musical": ("musical", "musicals", "musical"),
    "Mystery": ("mystery", "mysteries", "mysterious"),
    "Romance": ("love story", "love stories", "romantic"),
    "Science Fiction": ("sci-fi film", "sci-fi films", "futuristic"),
    "Thriller": ("thriller", "thrillers", "suspenseful"),
    "War": ("war film", "war films", "wartime"),
    "Western": ("western", "westerns", "western"),
}


def _lines(table: str) -> dict[str, str]:
    """Name and content of every `name: content` line; a line that begins with two spaces continues the one before."""
    return dict(line.split(": ", 1) for line in table.replace("\n  ", " ").strip().splitlines())


def _keyword_phrases(table: str) -> tuple[dict[str, str], dict[str, str]]:
    """The moods as adjectives, and what is said behind "film" for the other keywords."""
    moods, tails = {}, {}
    for opening, entries in _lines(table).items():
        for entry in entries.split(", "):
            keyword, _, words = entry.partition("=")
            if opening == "mood":
                moods[keyword] = words or keyword
            else:
                tails[keyword] = f"{opening} {words or keyword}"
    return moods, tails


MOODS, TAILS = _keyword_phrases(_KEYWORDS)

# {films} may be one film or several; {want} is "a slow drama about memory" or "something slow". No words here may be a
# title as the catalog writes it: that could give a film of the ground truth away.
_TEMPLATES = """
greeting: Hi! | Hello! | Hey there. | Good evening. | Hi, quick question. | Hello, I need a hand. | Hey, me again.
situation: We are choosing for Friday night. | I have the evening to myself. | My sister is coming over tomorrow.
  | It is raining all day here. | I have a long flight ahead of me. | My film club asked me to bring a title.
  | I keep scrolling and never decide. | A friend and I take turns picking, and this week I pick.
  | I am home with a cold. | I just finished a series and want a film again. | Two of us, one sofa, no plan.
  | I want to catch up on what I have missed. | My partner picked last time, so this one is mine.
first films: I loved {films}. What else would I like? | Can you recommend more in the vein of {films}?
  | What should I watch after {films}? | I just watched {films} and want more of that. | Anything close to {films}?
  | My favourites are {films}. Where do I go from there? | I could watch {films} every year. What comes near?
  | Somebody showed me {films} and I was hooked. More, please! | I am looking for movies like {films}.
  | Which films belong next to {films}? | What do people who love {films} watch next?
later films: I also enjoyed {films}. | Then there is {films}, which I adore. | Oh, and {films}, of course.
  | Last month I saw {films} and was impressed. | Let me add {films} to that. | I grew up with {films}.
  | If it helps, I rate {films} very highly. | And I can never get enough of {films}.
first wish: I am looking for {want}. | Could you suggest {want}? | I would like to see {want}. | What about {want}?
  | I am in the mood for {want}. | Do you know {want}? | Tonight it has to be {want}. | Please find me {want}.
  | I want {want}, {contrast}. | Point me to {want}, {contrast}. | I feel like watching {want}.
  | For once I want {want}. | Help me find {want}, please. | I could do with {want}, {contrast}.
later wish: Preferably {want}. | Best of all would be {want}. | It could well be {want}. | In general I go for {want}.
  | Give me {want} and I am happy. | I never say no to {want}. | I tend to like {want}. | Make it {want}.
  | Right now I would pick {want}. | Let us say {want}, {contrast}.
both: I want {want} like {films}, {contrast}. | Could you find {want}, a bit like {films}?
  | I loved {films}, so {want} would be perfect. | After {films} I want {want}. | Think of {films}: I am after {want}.
  | {films} set the bar. Is there {want} as good as that? | I am searching for {want}. I already know {films}.
  | I would love {want}. My reference is {films}. | {films} got me started, so {want}, please.
  | Something along the lines of {films}, I mean {want}. | I need {want}, {contrast}. I liked {films} a lot.
  | Find me {want} for a fan of {films}. | You know {films}? In that spirit I want {want}.
  | {films} made my week. Next I want {want}.
contrast: but shorter | but longer | but easier to follow | but nothing experimental | but easy to find
  | but a little lighter | but with a better ending | if there is one I have missed | but nothing too long
  | if possible one that holds up today | but with a good score
ask: Sure. What have you enjoyed lately? | Happy to help. Anything else I should know? | Noted. Anything to add?
  | Of course. Which films do you come back to? | Good taste! Can you tell me a bit more? | Could you narrow it down?
  | I have a few ideas. What matters most to you? | Got it. What are you in the mood for?
  | Let me think. Is there anything you want more of? | Do you have another example for me?
suggest: Have you seen {film}? | How about {film}? | Then you might like {film}. | My first thought is {film}.
  | Do you know {film}? | Maybe {film}? | Many people with your taste like {film}. | I would start with {film}.
  | That makes me think of {film}. | What did you make of {film}?
accept: Seen it, and I loved it. | Yes, one of my favourites! | I know it well, great choice.
  | I have seen that one twice, more like it please. | Exactly my kind of film, but I have seen it.
  | That was wonderful. What else? | Loved it! You are on the right track.
reject: No, that one did nothing for me. I do not like {dislike}. | Not for me, I am no fan of {dislike}.
  | I tried it and gave up. I have no patience for {dislike}. | Saw it, hated it. Please no {dislike}.
  | I would rather not, I avoid {dislike}. | Sorry, wrong direction: {dislike} leave me cold.
  | Hmm, no. I am tired of {dislike}.
dislike: Please no {dislike}. | I cannot stand {dislike}. | Just keep {dislike} away from me.
  | You can skip {dislike}. | I do not care for {dislike}. | Anything but {dislike}. | I have had enough of {dislike}.
  | No {dislike}, though.
closer: Thanks! | Thank you in advance. | What do you say? | Surprise me. | Any ideas? | I trust you. | Over to you.
  | I am curious what you find.
"""
TEMPLATES = {kind: tuple(map(str.strip, templates.split("|"))) for kind, templates in _lines(_TEMPLATES).items()}


@dataclass(frozen=True)
class Part:
    """What one user turn is about, and what the assistant said before it. Films and facts are indices."""

    films: tuple[int, ...]
    wishes: tuple[int, ...]
    suggested: int | None = None
    """A film the assistant names before the user speaks; without one it asks a question (the first part: nothing)."""
    rejects: bool = False
    dislikes: bool = False
    """Whether the user names the disliked fact unprompted."""


def _plan(rng: np.random.Generator, user: User) -> list[Part]:
    stated = [fact for fact in user.liked if rng.random() < STATED]
    num_parts = min(_pick(rng, (1, 2, 2, 3)), len(user.mentioned) + len(stated))
    # Films are dealt from the front and wishes from the back, so that no part is empty.
    parts = [
        Part(user.mentioned[place::num_parts], tuple(stated[num_parts - 1 - place :: num_parts]))
        for place in range(num_parts)
    ]
    if rng.random() < 0.5:
        parts.reverse()
    for place in range(1, num_parts):
        if parts[place].films and rng.random() < 0.5:
            film, *films = parts[place].films
            parts[place] = replace(parts[place], suggested=film, films=tuple(films))
    if user.disliked is not None:
        place = int(rng.random() * num_parts)
        if place > 0 and parts[place].suggested is None and user.rejected is not None:
            parts[place] = replace(parts[place], suggested=user.rejected, rejects=True)
        elif rng.random() < 0.7:
            parts[place] = replace(parts[place], dislikes=True)
    return parts


def _converse(rng: np.random.Generator, world: World, user: User) -> tuple[tuple[Turn, ...], list[int]]:
    """The conversation, which ends with the user's turn, and the films named in it in order of mention."""
    turns: list[Turn] = []
    seen: list[int] = []
    parts = _plan(rng, user)
    for place, part in enumerate(parts):
        said = []
        words = {"dislike": "" if user.disliked is None else _dislike(world.facts[user.disliked])}
        if part.suggested is not None:
            words["film"] = _film_name(rng, world.films[part.suggested])
            turns.append(Turn("assistant", _say(rng, "suggest", words)))
            said.append(_say(rng, "reject" if part.rejects else "accept", words))
            seen.append(part.suggested)
        elif place > 0:
            turns.append(Turn("assistant", _say(rng, "ask")))
        else:
            said += [_say(rng, "greeting")] if rng.random() < 0.5 else []
            said += [_say(rng, "situation")] if rng.random() < 0.7 else []
        said += _request(rng, world, part, "first" if place == 0 else "later")
        said += [_say(rng, "dislike", words)] if part.dislikes else []
        said += [_say(rng, "closer")] if part is parts[-1] and rng.random() < 0.35 else []
        seen += part.films
        turns.append(Turn("user", " ".join(said)))
    return tuple(turns), seen


def _request(rng: np.random.Generator, world: World, part: Part, when: str) -> list[str]:
    """Sentences that name the films and wishes of a part."""
    names = [_film_name(rng, world.films[film]) for film in part.films]
    words = {"films": " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))}
    if part.wishes:
        words |= {"want": _want(rng, [world.facts[fact] for fact in part.wishes]), "contrast": _say(rng, "contrast")}
    if names and part.wishes and rng.random() < 0.7:
        return [_say(rng, "both", words)]
    sentences = [_say(rng, f"{when} films", words)] if names else []
    return sentences + ([_say(rng, f"{'later' if names else when} wish", words)] if part.wishes else [])


def _say(rng: np.random.Generator, kind: str, words: dict[str, str] | None = None) -> str:
    return _pick(rng, TEMPLATES[kind]).format_map(words or {})


def _want(rng: np.random.Generator, facts: Sequence[Fact]) -> str:
    """A noun phrase for facts, such as "a slow and eerie sci-fi film by Andrei Tarkovsky, set in space"."""
    facts = _shuffled(rng, facts)
    genres = [fact.value for fact in facts if fact.kind == "genre"]
    adjectives = [MOODS[fact.value] for fact in facts if fact.kind == "keyword" and fact.value in MOODS]
    adjectives += [GENRE_NOUNS[genre][2] for genre in genres[1:]]
    noun = GENRE_NOUNS[genres[0]][0] if genres else _pick(rng, ("film", "movie", "something"))
    described = " and ".join(filter(None, [", ".join(adjectives[:-1]), *adjectives[-1:]]))
    if noun == "something":
        core = f"something {described}".strip()
    else:
        core = f"{described} {noun}".strip()
        core = f"{'an' if core[0] in 'aeiou' else 'a'} {core}"
    tails = [_tail(rng, fact) for fact in facts if fact.kind != "genre" and fact.value not in MOODS]
    return f"{core} {', '.join(tails)}".strip().replace(", about", " and about")


def _tail(rng: np.random.Generator, fact: Fact) -> str:
    if fact.kind == "director":
        return f"{_pick(rng, ('by', 'directed by'))} {fact.value}"
    if fact.kind == "decade":
        return f"from the {_pick(rng, (fact.value + 's', DECADES.get(fact.value, fact.value + 's')))}"
    return TAILS.get(fact.value, f"about {fact.value}")


def _dislike(fact: Fact) -> str:
    return GENRE_NOUNS[fact.value][1] if fact.kind == "genre" else f"{MOODS[fact.value]} films"


def _film_name(rng: np.random.Generator, film: Film) -> str:
    """Mostly `Title (Year)`; sometimes a bare title, where it names one film and can hardly be mistaken for a word."""
    clear = _seen_title(film) == film.title and len(film.title) > 3 and film.title[-1].isalnum()
    return film.title if clear and rng.random() < 0.2 else f"{film.title} ({film.year})"


@lru_cache(maxsize=1)
def _titles_of_several() -> frozenset[str]:
    count = Counter(film.title for film in demo_films())
    return frozenset(title for title in count if count[title] > 1)


def _seen_title(film: Film) -> str:
    """The title, with the year where remakes share it."""
    return f"{film.title} ({film.year})" if film.title in _titles_of_several() else film.title
