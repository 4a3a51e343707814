"""`rankgrpo recommend`: a ranked list for a conversation, from the command line, standard input or a JSONL batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rankgrpo.config import Config
from rankgrpo.data.samples import DataError, Sample, Turn, read_samples
from rankgrpo.evaluation.validate import recommend_lists
from rankgrpo.items.catalog import Catalog
from rankgrpo.model.policy import Policy
from rankgrpo.parse import parse_list

SPEAKERS = {"user": "user", "you": "user", "assistant": "assistant", "system": "assistant"}


def read_conversation(text: str) -> tuple[Turn, ...]:
    """Turns from text: a line `User: ...` or `Assistant: ...` opens a turn, anything else continues it.

    Text without such a line is one user turn. Raises DataError when there is no text.
    """
    turns: list[Turn] = []
    for line in text.strip().splitlines():
        speaker, separator, rest = line.partition(":")
        role = SPEAKERS.get(speaker.strip().lower()) if separator else None
        if role is not None:
            turns.append(Turn(role, rest.strip()))
        elif turns:
            turns[-1] = Turn(turns[-1].role, f"{turns[-1].content} {line.strip()}".strip())
        else:
            turns.append(Turn("user", line.strip()))
    if not any(turn.content for turn in turns):
        raise DataError("no conversation: pass it as an argument, on standard input, or as --batch FILE.jsonl")
    return tuple(turns)


def format_list(text: str, catalog: Catalog) -> str:
    """The list with ranks; `+` marks an item of the catalog, `?` one that is not, `!` a line without title and year."""
    lines = []
    for rank, item in enumerate(parse_list(text), start=1):
        if item.title is None:
            lines.append(f"{rank:3d} ! {text[slice(*item.chars)].strip()}")
        else:
            mark = "+" if catalog.lookup(item.title, item.year) is not None else "?"
            lines.append(f"{rank:3d} {mark} {item.title} ({item.year})")
    return "\n".join(lines) if lines else "(an empty list)"


def recommend(
    policy: Policy, catalog: Catalog, config: Config, *, conversation: str | None, batch: Path | None
) -> None:
    """Print one list for `conversation` (standard input when None), or a JSON line for every sample of `batch`."""
    if batch is None:
        turns = read_conversation(sys.stdin.read() if conversation is None else conversation)
        (text,) = recommend_lists(policy, [Sample("command-line", turns, (), ())], config)
        print(format_list(text, catalog))
        return
    samples, _ = read_samples(batch)
    for sample, text in zip(samples, recommend_lists(policy, samples, config, title="recommend"), strict=True):
        items = [
            {"title": item.title, "year": item.year, "in_catalog": catalog.lookup(item.title, item.year) is not None}
            if item.title is not None
            else {"line": text[slice(*item.chars)]}
            for item in parse_list(text)
        ]
        print(json.dumps({"id": sample.id, "items": items}, ensure_ascii=False))
