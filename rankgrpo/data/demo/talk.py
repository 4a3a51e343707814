"""The conversations of the demo's simulated users: which turn says what, and in which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankgrpo.data.demo.words import DECADES, GENRE_NOUNS, MOODS, TAILS, TEMPLATES
from rankgrpo.data.demo.world import Fact, Film, User, World, pick, seen_title, shuffled
from rankgrpo.data.samples import Turn

STATED = 0.8  # chance that a liked fact is put into words


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
    num_parts = min(pick(rng, (1, 2, 2, 3)), len(user.mentioned) + len(stated))
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


def converse(rng: np.random.Generator, world: World, user: User) -> tuple[tuple[Turn, ...], list[int]]:
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
    return pick(rng, TEMPLATES[kind]).format_map(words or {})


def _want(rng: np.random.Generator, facts: Sequence[Fact]) -> str:
    """A noun phrase for facts, such as "a slow and eerie sci-fi film by Andrei Tarkovsky, set in space"."""
    facts = shuffled(rng, facts)
    genres = [fact.value for fact in facts if fact.kind == "genre"]
    adjectives = [MOODS[fact.value] for fact in facts if fact.kind == "keyword" and fact.value in MOODS]
    adjectives += [GENRE_NOUNS[genre][2] for genre in genres[1:]]
    noun = GENRE_NOUNS[genres[0]][0] if genres else pick(rng, ("film", "movie", "something"))
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
        return f"{pick(rng, ('by', 'directed by'))} {fact.value}"
    if fact.kind == "decade":
        return f"from the {pick(rng, (fact.value + 's', DECADES.get(fact.value, fact.value + 's')))}"
    return TAILS.get(fact.value, f"about {fact.value}")


def _dislike(fact: Fact) -> str:
    return GENRE_NOUNS[fact.value][1] if fact.kind == "genre" else f"{MOODS[fact.value]} films"


def _film_name(rng: np.random.Generator, film: Film) -> str:
    """Mostly `Title (Year)`; sometimes a bare title, where it names one film and can hardly be mistaken for a word."""
    clear = seen_title(film) == film.title and len(film.title) > 3 and film.title[-1].isalnum()
    return film.title if clear and rng.random() < 0.2 else f"{film.title} ({film.year})"
