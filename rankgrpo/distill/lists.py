"""What a teacher lists for every conversation: items of the catalog, and titles that the catalog does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rankgrpo.data.prompt import DEFAULT_PROMPT, PromptFormat
from rankgrpo.data.samples import Sample
from rankgrpo.distill.llm import CallReport, Endpoint, Estimate, ReplyLog, ask_all, estimate_calls
from rankgrpo.distill.metadata import item_name
from rankgrpo.distill.replies import item_lines
from rankgrpo.items.catalog import Catalog, Item, normalise_title
from rankgrpo.parse import ListedItem, parse_list

TOKENS_PER_LINE = 20
MIN_READABLE = 0.5

Match = Callable[[str], int | None]
"""From a line of a list to a catalog index, or None where no catalog item is meant."""


@dataclass(frozen=True)
class TeacherLists:
    """One list a sample, and the items that lists name."""

    items: tuple[Item, ...]
    """The catalog's items, then those that the teacher named and the catalog lacks."""
    lists: list[list[int] | None]
    """By sample, places in `items`, best first; None where the teacher gave no list."""

    def text(self, sample: int, num_items: int) -> str:
        """The first `num_items` of a sample's list as the teacher gave it."""
        return "\n".join(item_name(self.items[index]) for index in (self.lists[sample] or ())[:num_items])


def list_prompt(sample: Sample, num_items: int, prompt: PromptFormat = DEFAULT_PROMPT) -> str:
    """The paper's prompt, or what says the same of other items, for `num_items` recommendations."""
    return prompt.text(sample, num_items)


def is_list(
    reply: str, parse: Callable[[str], list[ListedItem]] = parse_list, match: Match = lambda line: None
) -> bool:
    """Whether at least half of the `item_lines` read as items: `parse` is the catalog's reader, `match` knows them."""
    text = item_lines(reply, lambda line: match(line) is not None)
    lines = parse(text)
    num_items = sum(line.title is not None or match(text[slice(*line.chars)]) is not None for line in lines)
    return bool(lines) and num_items >= MIN_READABLE * len(lines)


def estimate_lists(
    samples: Sequence[Sample],
    num_items: int,
    endpoint: Endpoint,
    log: ReplyLog,
    prompt: PromptFormat = DEFAULT_PROMPT,
) -> Estimate:
    """The cost of `ask_lists`."""
    prompts = [list_prompt(sample, num_items, prompt) for sample in samples]
    return estimate_calls(endpoint, prompts, TOKENS_PER_LINE * num_items, log)


def ask_lists(
    samples: Sequence[Sample],
    catalog: Catalog,
    match: Match,
    num_items: int,
    endpoint: Endpoint,
    log: ReplyLog,
    prompt: PromptFormat = DEFAULT_PROMPT,
) -> tuple[TeacherLists, CallReport]:
    """The teacher's list for every sample, at most `num_items` long, each line matched to the catalog where it can be.

    Lines that are no item are left out, and so are repeats.
    """
    replies, report = ask_all(
        endpoint,
        [list_prompt(sample, num_items, prompt) for sample in samples],
        log,
        max_tokens=TOKENS_PER_LINE * num_items,
        is_readable=lambda _, reply: is_list(reply, catalog.parse, match),
        title="teacher lists",
    )
    return read_lists(replies, catalog, match, num_items), report


def read_lists(replies: Sequence[str | None], catalog: Catalog, match: Match, num_items: int) -> TeacherLists:
    """Answers as lists of at most `num_items` different items. A line that `match` knows is a catalog item; any other
    is a new one if it reads as an item of the catalog's format, and else left out."""
    items = list(catalog.items)
    new: dict[tuple[str, int | None], int] = {}
    lists: list[list[int] | None] = []
    for reply in replies:
        places: dict[int, None] = {}
        text = item_lines(reply or "", lambda line: match(line) is not None)
        for line in catalog.parse(text):
            place = match(text[slice(*line.chars)])
            if place is None and line.title is not None:
                place = new.setdefault((normalise_title(line.title), line.year), len(items))
                if place == len(items):
                    items.append(Item(line.title, line.year))
            if place is not None:
                places.setdefault(place)
        lists.append(None if reply is None else list(places)[:num_items])
    return TeacherLists(tuple(items), lists)


def lists_of_rows(rows: Sequence[dict[str, Any]], catalog: Catalog) -> TeacherLists:
    """The lists of a teacher.jsonl; titles that the catalog lacks become items of their own."""
    items, new = list(catalog.items), {}
    lists: list[list[int] | None] = []
    for row in rows:
        listed = []
        for title, year in row["items"] or ():
            index = catalog.lookup(title, year)
            if index is None:
                index = new.setdefault((title, year), len(items))
                if index == len(items):
                    items.append(Item(title, year))
            listed.append(index)
        lists.append(None if row["items"] is None else listed)
    return TeacherLists(tuple(items), lists)
