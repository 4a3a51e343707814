"""The parts of a reward, measured: our own by name, a user's as `package.module:function`.

A part is a function of one `Answer`. It returns K numbers, one a rank (a rank that the list does not have has one too),
or one number for the whole list:

    def shouting(answer: Answer) -> list[float]:
        titles = [item.title or "" for item in answer.items[: answer.num_ranks]]
        return [float(title.isupper()) for title in titles] + [0.0] * (answer.num_ranks - len(titles))

`rankgrpo.rollouts.score` turns what ranks earn into returns (Eq. 8, 9; DCG@K for the units token and list) and gives
what the whole list earns to every rank of it.
"""

# Shape letters: P prompts, G lists a prompt, B = P*G, K ranks.
from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from rankgrpo.config import PARTS, reward_terms
from rankgrpo.data.samples import Sample
from rankgrpo.errors import ConfigError, TrainingError
from rankgrpo.items.catalog import Catalog
from rankgrpo.parse import ListedItem
from rankgrpo.reward import relevance


@dataclass(frozen=True)
class Answer:
    """One sampled list and what it answers: all that a part may read."""

    sample: Sample
    """The conversation, its ground truth and the titles seen in it."""
    text: str
    """The completion, without special tokens."""
    finished: bool
    """False when it was cut at rl.max_new_tokens."""
    catalog: Catalog
    """What the list may name: the sample's candidates where it brings any."""
    num_ranks: int
    """K, the lines asked for."""
    year_tolerance: int = 0

    @cached_property
    def items(self) -> list[ListedItem]:
        """The lines that are not blank, those beyond K too; `title` is None for a line that is no item."""
        return self.catalog.parse(self.text)

    @cached_property
    def indices(self) -> list[int | None]:
        """By line, the index in `catalog.items` of the item that it names; None for a line that names none."""
        return [None if item.title is None else self.catalog.lookup(item.title, item.year) for item in self.items]


Part = Callable[[Answer], float | Sequence[float] | Tensor]


def load_parts(reward: str, catalog: Catalog) -> dict[str, Part]:
    """The functions behind the names of `reward` (rl.reward), in its order; `catalog` is the data set's, whole.

    Modules are looked for where Python looks and in the working folder. Raises ConfigError for a function that cannot
    be imported, and for novelty where the catalog holds no popularity.
    """
    highest = max((item.popularity for item in catalog), default=0)
    own = _own_parts(highest)
    parts = {name: own[name] if name in PARTS else _import(name) for name in reward_terms(reward)}
    if "novelty" in parts and not highest:
        raise ConfigError("rl.reward: novelty needs the field popularity in the catalog, which has none above 0")
    return parts


def measure(name: str, part: Part, answers: Sequence[Answer]) -> Tensor:
    """What a part gives every answer: (B, K), or (B,) for a part of whole lists.

    Raises TrainingError naming the part and the sample when it raises, or returns something else or not finite.
    """
    values = [_measure(name, part, answer) for answer in answers]
    for value, answer in zip(values, answers, strict=True):
        if value.shape != values[0].shape:
            raise TrainingError(
                f"reward part {name!r}, sample {answer.sample.id!r}: one number a list for some lists, one a rank for "
                "others; it must be the same for all"
            )
    return torch.stack(values)


def _measure(name: str, part: Part, answer: Answer) -> Tensor:
    where = f"reward part {name!r}, sample {answer.sample.id!r}"
    try:
        returned = part(answer)
    except Exception as error:  # a user's function may raise anything
        raise TrainingError(
            f"{where}: it raised {type(error).__name__}: {error} (RANKGRPO_TRACEBACK=1 shows where)"
        ) from error
    try:
        value = torch.as_tensor(returned, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TrainingError(f"{where}: expected numbers, got {returned!r}") from None
    if value.shape not in ((), (answer.num_ranks,)):
        raise TrainingError(
            f"{where}: expected one number, or one for each of the {answer.num_ranks} ranks; got the shape "
            f"{tuple(value.shape)}"
        )
    if not bool(value.isfinite().all()):
        raise TrainingError(f"{where}: not finite: {value.tolist()}")
    return value


def _import(name: str) -> Part:
    module_name, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that nothing in the working folder hides an installed module
    try:
        part = vars(importlib.import_module(module_name))[function]
    except ImportError as error:
        raise ConfigError(f"rl.reward: cannot import {module_name!r} for {name!r} ({error})") from error
    except KeyError:
        raise ConfigError(f"rl.reward: module {module_name!r} has no {function!r}") from None
    if not callable(part):
        raise ConfigError(f"rl.reward: {name!r} is not a function but {type(part).__name__}")
    return part


# ----------------------------------------------------------------------------------------------------------------------
# Our own


def _relevance(answer: Answer) -> Tensor:
    return relevance(
        answer.items,
        answer.sample.groundtruth,
        catalog=answer.catalog,
        seen=answer.sample.seen_titles,
        num_ranks=answer.num_ranks,
        year_tolerance=answer.year_tolerance,
        gains=answer.sample.gains,
    )


def _format(answer: Answer) -> Tensor:
    return _by_rank([float(item.title is not None) for item in answer.items], answer.num_ranks)


def _in_catalog(answer: Answer) -> Tensor:
    return _by_rank([float(index is not None) for index in answer.indices], answer.num_ranks)


def repetition(answer: Answer) -> Tensor:
    """(K,) 1 where a line names an item that an earlier line named, by catalog item or by title and year outside it."""
    repeat_K, earlier = torch.zeros(answer.num_ranks), set()
    lines = list(zip(answer.items, answer.indices, strict=True))
    for rank, (item, index) in enumerate(lines[: answer.num_ranks]):
        if item.title is None:
            continue
        key = (answer.catalog.title_key(item.title), item.year) if index is None else index
        repeat_K[rank] = key in earlier
        earlier.add(key)
    return repeat_K


def _novelty(answer: Answer, highest: int) -> Tensor:
    """1 - log(1 + count) / log(1 + highest count) by line, count that of its item; 0 for one outside the catalog.

    highest: of the whole catalog, so that an item is worth the same whatever candidates it stands among.
    """
    counts = [None if index is None else answer.catalog.items[index].popularity for index in answer.indices]
    values = [0.0 if count is None else 1 - math.log1p(count) / math.log1p(highest) for count in counts]
    return _by_rank(values, answer.num_ranks)


def _length(answer: Answer) -> float:
    num_lines = len(answer.items)
    return min(num_lines, answer.num_ranks) / max(num_lines, answer.num_ranks)


def _by_rank(values: list[float], num_ranks: int) -> Tensor:
    return torch.tensor((values + [0.0] * num_ranks)[:num_ranks])


def _own_parts(highest_popularity: int) -> dict[str, Part]:
    return {
        "relevance": _relevance,
        "format": _format,
        "in_catalog": _in_catalog,
        "repetition": repetition,
        "novelty": partial(_novelty, highest=highest_popularity),
        "length": _length,
    }
