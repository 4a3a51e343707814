"""Lists held to the catalog: the policy's distribution is over lists of K catalog lines, and over nothing else.

    p(y | x) = prod_t softmax over allowed(y_<t) of logits_t, at y_t

What is allowed is a function of the ids of the list alone (`rankgrpo.items.trie`), so sampler, trainer and reference
agree without handing anything over. A token beside which nothing was allowed has log-prob 0 and no gradient.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rankgrpo.data.candidates import excluded_items
from rankgrpo.data.dialogs import seen_items
from rankgrpo.data.prompt import thinking_asked
from rankgrpo.data.samples import Sample
from rankgrpo.errors import ConfigError
from rankgrpo.items.catalog import Catalog
from rankgrpo.items.choices import Choices
from rankgrpo.items.trie import CatalogTrie, Forbid
from rankgrpo.items.walk import ListWalk
from rankgrpo.model.packing import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankgrpo.config import Config
    from rankgrpo.model.plain_policy import PlainPolicy
    from rankgrpo.model.policy import Policy

    PolicyT = TypeVar("PolicyT", Policy, PlainPolicy)


@dataclass(frozen=True)
class Constraint:
    """What a list may be. Made by `open_constraint`."""

    trie: CatalogTrie
    num_ranks: int
    forbid: Forbid
    max_tokens: int
    """Tokens of the longest list there can be, end token included: no list is cut."""

    def start(self, seen: Sequence[int] = ()) -> ListWalk:
        """A list before its first token, where these items must not be named (`Policy.seen`)."""
        return self.trie.start(self.num_ranks, forbid=self._terms([seen]), seen=seen)

    def choices(self, groups: Sequence[Group]) -> Choices:
        """What was allowed at every token of every list, group by group."""
        lists = [ids for group in groups for ids in group.completion_ids]
        seen = [group.seen for group in groups for _ in group.completion_ids]
        return self.trie.choices(lists, self.num_ranks, forbid=self._terms(seen), seen=seen)

    def _terms(self, seen: Sequence[Sequence[int]]) -> Forbid:
        """Candidates close all other items also where what was seen is allowed."""
        return "repeats+seen" if self.forbid == "repeats" and any(seen) else self.forbid


def open_constraint(
    catalog: Catalog, tokenizer: PreTrainedTokenizerBase, *, num_ranks: int, forbid: Forbid
) -> Constraint:
    """The constraint of a catalog under a tokenizer. Raises ConfigError as `constraint_of_lines`."""
    return constraint_of_lines(catalog.lines, tokenizer, num_ranks=num_ranks, forbid=forbid)


def constraint_of_lines(
    lines: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, num_ranks: int, forbid: Forbid
) -> Constraint:
    """The constraint of a catalog's lines, item i's at place i, under a tokenizer.

    Raises ConfigError, which says which line, for a catalog that cannot be written so.
    """
    try:
        trie = CatalogTrie.build(lines, tokenizer, num_ranks=num_ranks, eos_id=tokenizer.eos_token_id)
    except ValueError as error:
        raise ConfigError(
            f"lists held to the catalog: {error}; or decode freely, rl.constrain=none eval.constrain=run"
        ) from error
    return Constraint(trie, num_ranks, forbid, longest_list(trie, num_ranks, repeats=forbid == "none"))


def hold_to_catalog(policy: PolicyT, config: Config, catalog: Catalog, *, shown: bool = False) -> PolicyT:
    """The policy under rl.constrain: itself, or the same with its lists held to the catalog.

    shown: under eval.constrain, for lists that are scored after training or shown.
    """
    if (config.shown_constrain if shown else config.rl.constrain) == "none":
        return policy
    if asked := thinking_asked(json.loads(config.data.chat_template_kwargs)):
        raise ConfigError(
            f"data.chat_template_kwargs: {asked} asks for a thought before the list, and a list held to the catalog "
            "has none; leave it out, or decode freely, rl.constrain=none eval.constrain=run"
        )
    constraint = open_constraint(catalog, policy.tokenizer, num_ranks=config.data.num_ranks, forbid=config.rl.forbid)
    return replace(policy, constraint=constraint)


def longest_list(trie: CatalogTrie, num_ranks: int, *, repeats: bool) -> int:
    """Tokens of the longest list of `num_ranks` lines, the end token included; an upper bound by at most K tokens."""
    longest = np.sort(trie.line_lengths())[::-1]
    chosen = np.full(num_ranks, longest[0]) if repeats else longest[:num_ranks]
    return int(chosen.sum())


def forbidden_items(
    constraint: Constraint | None, samples: Sequence[Sample], catalog: Catalog
) -> list[tuple[int, ...]]:
    """For every sample the items that its lists must not name: what was seen, where that is forbidden, and all but its
    candidates, where it brings any. Nothing where lists are not held to the catalog."""
    if constraint is None:
        return [()] * len(samples)
    closed = []
    for sample in samples:
        items = seen_items(sample, catalog) if constraint.forbid == "repeats+seen" else []
        others = excluded_items(sample, catalog) if sample.candidates else []
        closed.append(tuple(dict.fromkeys([*items, *others])))
    return closed
