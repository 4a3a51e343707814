"""`rankgrpo recommend`: a ranked list for a conversation, from the command line, standard input or a JSONL batch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rankgrpo.config import Config
from rankgrpo.config_file import load_config
from rankgrpo.data.candidates import sample_catalog
from rankgrpo.data.conversation import read_conversation
from rankgrpo.data.load import load_catalog
from rankgrpo.data.samples import Sample, read_samples
from rankgrpo.errors import ConfigError, DataError
from rankgrpo.evaluation.lists import recommend_lists
from rankgrpo.evaluation.run_folder import is_run, run_models
from rankgrpo.items.catalog import Catalog
from rankgrpo.items.format import ItemFormat, title_line
from rankgrpo.model.plain_policy import PlainPolicy, open_plain_policy
from rankgrpo.parse import ListedItem
from rankgrpo.sampler.base import Sampler
from rankgrpo.sampler.constrained import ConstrainedSampler
from rankgrpo.sampler.hf import HFSampler

if TYPE_CHECKING:
    from rankgrpo.model.policy import Policy

DEFAULT_RUN = "runs/tiny-demo"


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
    policy: Policy | PlainPolicy,
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
        own = sample_catalog(sample, catalog)
        items = [
            _named(item, own) if item.title is not None else {"line": text[slice(*item.chars)]}
            for item in own.parse(text)
        ]
        print(json.dumps({"id": sample.id, "items": items}, ensure_ascii=False))


def _named(item: ListedItem, catalog: Catalog) -> dict[str, object]:
    """An item of a list as JSON: title and year, or its line where the format has no year."""
    name = {"item": item.title} if item.year is None else {"title": item.title, "year": item.year}
    return {**name, "in_catalog": catalog.lookup(item.title, item.year) is not None}


def recommend_from(
    model: str, data: str | None, conversation: str | None, batch: Path | None, overrides: Sequence[str] = ()
) -> None:
    """Recommend with a run's latest model, or with any model; the catalog is the run's unless `data` names another.

    Lists held to the catalog are decoded greedily, unless `overrides` name eval.temperature: they cannot fall into the
    loops for which small models are sampled, and a greedy list is better than a drawn one (docs/sampling.md).
    """
    folder = Path(model)
    config = load_config(folder / "config.toml" if is_run(folder) else None, list(overrides), saved=True)
    if is_run(folder):
        *_, model = map(str, run_models(folder).values())
    elif model == DEFAULT_RUN and not folder.exists():
        raise ConfigError(f"{model}: no such run; `make train` (or `rankgrpo run`) makes it, or name one with --model")
    if data is not None:
        config = replace(config, data=replace(config.data, path=data))
    if config.shown_constrain == "catalog" and not any(word.startswith("eval.temperature=") for word in overrides):
        config = replace(config, eval=replace(config.eval, temperature=0.0, draws=1))
    catalog = load_catalog(config.data.path, ItemFormat(config.data.item))
    plain = open_plain_policy(Path(model), config, catalog) if is_run(folder) and needs_no_engine(config) else None
    if plain is not None:
        torch.set_flush_denormal(True)  # as `runtime.distributed.start_parallel` does
        sampler = plain_sampler(plain, config)
        recommend(plain, sampler, catalog, config, conversation=conversation, batch=batch)
        return
    from rankgrpo.model.constraint import hold_to_catalog
    from rankgrpo.model.policy import open_policy
    from rankgrpo.runtime.distributed import start_parallel
    from rankgrpo.sampler.choose import ready_sampler
    from rankgrpo.sampler.verify import verify_policy

    parallel = start_parallel()
    policy = open_policy(model, config.model, parallel.device, trainable=False)
    policy = verify_policy(hold_to_catalog(policy, config, catalog, shown=True), config)
    with ready_sampler(policy, config, parallel) as sampler:
        recommend(policy, sampler, catalog, config, conversation=conversation, batch=batch)


def needs_no_engine(config: Config) -> bool:
    """Are lists sampled on the CPU, by one process, without vLLM?"""
    alone = not torch.cuda.is_available() and "WORLD_SIZE" not in os.environ
    return alone and config.rl.sampler in ("auto", "hf")


def plain_sampler(policy: PlainPolicy, config: Config) -> HFSampler:
    rows = config.rl.sampler_rows
    if policy.constraint is None:
        return HFSampler(policy.model, policy.tokenizer, allowed_V=policy.allowed_V, rows=rows)
    return ConstrainedSampler(policy.model, policy.tokenizer, policy.constraint, rows=rows)
