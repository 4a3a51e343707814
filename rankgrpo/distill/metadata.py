"""A text about every item, which the remap stage embeds: what the teacher knows of it, or what the catalog says.

The format is the paper's (appendix A):

    Heat (1995)
    Keywords: heist, Los Angeles, cat and mouse
    Plots: A master thief and the detective on his trail ...

The teacher is asked for items of the catalog and for those that it made up or that the catalog lacks. The paper looks
up in a search engine what the teacher does not know; here the catalog's genres and plot, where it has them, go into the
question instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rankgrpo.data.prompt import DEFAULT_PROMPT, PromptFormat
from rankgrpo.distill.llm import CallReport, Endpoint, Estimate, ReplyLog, ask_all, estimate_calls
from rankgrpo.items.catalog import Item

MAX_TOKENS = 300
MAX_FACTS_CHARS = 1500

PROMPT = (
    "Describe a {noun} for someone who wants to find similar ones. Answer in exactly this form, with NO extra words:\n"
    "{name}\n"
    "Keywords: ten keywords, separated by commas: genres, themes, mood, setting, people\n"
    "Plots: the plot in one paragraph\n"
    "If you do not know the {noun}, describe what its title suggests.{facts}\n"
    "The {noun} is {name}."
)

_REPLY = re.compile(r"(?ims)^\W*keywords\W*:\s*(?P<keywords>[^\n]*\w[^\n]*)\n+\W*plots?\W*:\s*(?P<plots>.*\w.*)")


def item_name(item: Item) -> str:
    """The item as lists write it: Title (Year), unless the catalog has another format."""
    return item.line


def catalog_text(item: Item) -> str:
    """The text about an item from the catalog's own fields; an item without them has its name alone."""
    lines = [item_name(item)]
    if item.genres:
        lines.append(f"Keywords: {', '.join(item.genres)}")
    if item.text:
        lines.append(f"Plots: {item.text}")
    return "\n".join(lines)


def metadata_prompt(item: Item, prompt: PromptFormat = DEFAULT_PROMPT) -> str:
    """The question about an item, with what the catalog knows of it."""
    facts = catalog_text(item)[:MAX_FACTS_CHARS].partition("\n")[2]
    known = f"\nWhat is known of it:\n{facts}" if facts else ""
    return prompt.words(PROMPT).replace("{facts}", known).replace("{name}", item_name(item))


def read_metadata(item: Item, reply: str) -> str | None:
    """The text about an item from an answer; None unless it has keywords and a plot."""
    match = _REPLY.search(reply)
    if match is None:
        return None
    keywords, plots = (" ".join(match[name].strip(" *_").split()) for name in ("keywords", "plots"))
    return f"{item_name(item)}\nKeywords: {keywords}\nPlots: {plots}"


def estimate_metadata(
    items: Sequence[Item], endpoint: Endpoint, log: ReplyLog, prompt: PromptFormat = DEFAULT_PROMPT
) -> Estimate:
    """The cost of `ask_metadata`."""
    return estimate_calls(endpoint, [metadata_prompt(item, prompt) for item in items], MAX_TOKENS, log)


def ask_metadata(
    items: Sequence[Item], endpoint: Endpoint, log: ReplyLog, prompt: PromptFormat = DEFAULT_PROMPT
) -> tuple[list[str], CallReport]:
    """A text an item from the teacher; the catalog's own where it gave none that can be read."""
    replies, report = ask_all(
        endpoint,
        [metadata_prompt(item, prompt) for item in items],
        log,
        max_tokens=MAX_TOKENS,
        is_readable=lambda _, reply: _REPLY.search(reply) is not None,
        title="metadata",
    )
    texts = []
    for item, reply in zip(items, replies, strict=True):
        text = None if reply is None else read_metadata(item, reply)
        texts.append(catalog_text(item) if text is None else text)
    return texts, report
