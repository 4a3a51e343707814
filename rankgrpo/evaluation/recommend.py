"""`rankgrpo recommend`: a ranked list for a conversation, from the command line, standard input or a JSONL batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rankgrpo.config import Config
from rankgrpo.data.conversation import read_conversation
from rankgrpo.data.samples import Sample, read_samples
from rankgrpo.errors import DataError
from rankgrpo.evaluation.validate import recommend_lists
from rankgrpo.items.catalog import Catalog
from rankgrpo.items.format import title_line
from rankgrpo.model.policy import Policy
from rankgrpo.parse import ListedItem
from rankgrpo.sampler.base import Sampler


def format_list(text: str, catalog: Catalog) -> str:
    """The list with ranks; `+` marks an item of the catalog, `?` one that is not, `!` a line that is no item."""
    lines = []
    for rank, item in enumerate(catalog.parse(text), start=1):
        if item.title is None:
            lines.append(f"{rank:3d} ! {text[slice(*item.chars)].strip()}")
        else:
            mark = "+" if catalog.lookup(item.title, item.year) is not None else "?"
            lines.append(f"{rank:3d} {mark} {title_line(item.title, item.year)}")
    return "\n".join(lines) if lines else "(an empty list)"


def recommend(
    policy: Policy,
    sampler: Sampler,
    catalog: Catalog,
    config: Config,
    *,
    conversation: str | None,
    batch: Path | None,
) -> None:
    """Print one list for `conversation` (standard input when None), or a JSON line for every sample of `batch`."""
    if batch is None:
        turns = read_conversation(sys.stdin.read() if conversation is None else conversation)
        if not turns:
            raise DataError("no conversation: pass it as an argument, on standard input, or as --batch FILE.jsonl")
        (text,) = recommend_lists(policy, sampler, [Sample("command-line", turns, (), ())], catalog, config)
        print(format_list(text, catalog))
        return
    samples, _ = read_samples(batch, item_format=catalog.item_format)
    lists = recommend_lists(policy, sampler, samples, catalog, config, title="recommend")
    for sample, text in zip(samples, lists, strict=True):
        items = [
            _named(item, catalog) if item.title is not None else {"line": text[slice(*item.chars)]}
            for item in catalog.parse(text)
        ]
        print(json.dumps({"id": sample.id, "items": items}, ensure_ascii=False))


def _named(item: ListedItem, catalog: Catalog) -> dict[str, object]:
    """An item of a list as JSON: title and year, or its line where the format has no year."""
    name = {"item": item.title} if item.year is None else {"title": item.title, "year": item.year}
    return {**name, "in_catalog": catalog.lookup(item.title, item.year) is not None}
