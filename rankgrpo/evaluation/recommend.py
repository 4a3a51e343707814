"""`rankgrpo recommend`: a ranked list for a conversation, from the command line, standard input or a JSONL batch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rankgrpo.config import Config
from rankgrpo.config_file import load_config
from rankgrpo.data.candidates import check_candidates, sample_catalog
from rankgrpo.data.conversation import read_conversation
from rankgrpo.data.load import DEMO, load_catalog, needs_candidates
from rankgrpo.data.prompt import PromptFormat, open_prompt
from rankgrpo.data.samples import Sample, read_samples
from rankgrpo.errors import ConfigError, DataError
from rankgrpo.evaluation.lists import recommend_lists
from rankgrpo.evaluation.run_folder import is_run, run_models
from rankgrpo.files.rows import read_jsonl
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
    trained_on: str | None,
) -> None:
    """Print one list for `conversation` (standard input when None), or a JSON line for every sample of `batch`.

    trained_on: the model's own data set, None where nobody knows it. Raises DataError and ConfigError for what no
    prompt that the model was trained under can be made of.
    """
    if batch is None:
        turns = read_conversation(sys.stdin.read() if conversation is None else conversation)
        if not turns:
            raise DataError("no conversation: pass it as an argument, on standard input, or as --batch FILE.jsonl")
        asked = Sample("command-line", turns, (), ())
        _check_conversation(asked, config, trained_on)
        (text,) = recommend_lists(policy, sampler, [asked], catalog, config)
        print(format_list(text, catalog))
        return
    samples, _ = read_samples(batch, item_format=catalog.item_format)
    _check_batch(batch, samples, catalog, config, trained_on)
    lists = recommend_lists(policy, sampler, samples, catalog, config, title="recommend")
    for sample, text in zip(samples, lists, strict=True):
        own = sample_catalog(sample, catalog)
        items = [
            _named(item, own) if item.title is not None else {"line": text[slice(*item.chars)]}
            for item in own.parse(text)
        ]
        print(json.dumps({"id": sample.id, "items": items}, ensure_ascii=False))


def _check_conversation(asked: Sample, config: Config, trained_on: str | None) -> None:
    if lacking := _lacking(asked, open_prompt(config.data), _wants_candidates([asked], trained_on)):
        raise DataError(
            f"the prompts of this model show {lacking}, which a conversation alone does not bring; give --batch "
            "FILE.jsonl, samples that do"
        )


def _check_batch(
    batch: Path, samples: Sequence[Sample], catalog: Catalog, config: Config, trained_on: str | None
) -> None:
    prompt, wanted = open_prompt(config.data), _wants_candidates(samples, trained_on)
    held = config.shown_constrain == "catalog"
    for place, sample in enumerate(samples):
        try:
            if lacking := _lacking(sample, prompt, wanted):
                raise DataError(f"sample {sample.id!r} lacks {lacking}, which the prompts of this model show; add that")
            if sample.candidates and not prompt.shows_candidates:
                raise DataError(
                    f"sample {sample.id!r} has candidates, which the prompts of this model do not show "
                    f"({prompt.source}); leave them out"
                )
            check_candidates([sample], catalog, config.data.num_ranks, config.rl.forbid, held=held)
        except (ConfigError, DataError) as error:
            line = [line for line, _ in read_jsonl(batch)][place]
            raise type(error)(f"{batch}:{line}: {error}") from None


def _wants_candidates(samples: Iterable[Sample], trained_on: str | None) -> bool:
    """Whether one of the samples lacks the candidates that all training samples had."""
    return trained_on is not None and any(not s.candidates for s in samples) and needs_candidates(trained_on)


def _lacking(sample: Sample, prompt: PromptFormat, wants_candidates: bool) -> str:
    """What the prompts of the model show and the sample does not bring, in words; empty for nothing."""
    lacking = [f"the field {name!r}" for name in prompt.missing_fields(sample)]
    if wants_candidates and not sample.candidates:
        lacking.append("candidates")
    return " and ".join(lacking)


def _named(item: ListedItem, catalog: Catalog) -> dict[str, object]:
    """An item of a list as JSON: title and year, or its line where the format has no year."""
    name = {"item": item.title} if item.year is None else {"title": item.title, "year": item.year}
    return {**name, "in_catalog": catalog.lookup(item.title, item.year) is not None}


def recommend_from(
    model: str, data: str | None, conversation: str | None, batch: Path | None, overrides: Sequence[str] = ()
) -> None:
    """Recommend with a run's latest model, or with any model; the catalog is the run's unless `data` names another.

    A model out of a run folder (RUN/sft/final) is asked as its run was.

    Lists held to the catalog are decoded greedily, unless `overrides` name eval.temperature: they cannot fall into the
    loops for which small models are sampled, and a greedy list is better than a drawn one (docs/sampling.md).
    """
    folder = Path(model)
    if model == DEFAULT_RUN and not folder.exists():
        raise ConfigError(f"{model}: no such run; `make train` (or `rankgrpo run`) makes it, or name one with --model")
    if is_run(folder):
        run: Path | None = folder
        *_, model = map(str, run_models(folder).values())
    else:
        from rankgrpo.model.fit import run_of

        run = run_of(model)
    config = load_config(run / "config.toml" if run is not None else None, list(overrides), saved=True)
    trained_on = None if run is None else config.data.path
    if data is not None:
        config = replace(config, data=replace(config.data, path=data))
        if trained_on is not None and trained_on != DEMO and not Path(trained_on).is_dir():
            trained_on = data  # the run's own data set, in another place
    open_prompt(config.data).check(())
    if config.shown_constrain == "catalog" and not any(word.startswith("eval.temperature=") for word in overrides):
        config = replace(config, eval=replace(config.eval, temperature=0.0, draws=1))
    catalog = load_catalog(config.data.path, ItemFormat(config.data.item))
    plain = open_plain_policy(Path(model), config, catalog) if is_run(folder) and needs_no_engine(config) else None
    if plain is not None:
        torch.set_flush_denormal(True)  # as `runtime.distributed.start_parallel` does
        sampler = plain_sampler(plain, config)
        recommend(plain, sampler, catalog, config, conversation=conversation, batch=batch, trained_on=trained_on)
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
        recommend(policy, sampler, catalog, config, conversation=conversation, batch=batch, trained_on=trained_on)


def needs_no_engine(config: Config) -> bool:
    """Are lists sampled on the CPU, by one process, without vLLM?"""
    alone = not torch.cuda.is_available() and "WORLD_SIZE" not in os.environ
    return alone and config.rl.sampler in ("auto", "hf")


def plain_sampler(policy: PlainPolicy, config: Config) -> HFSampler:
    rows = config.rl.sampler_rows
    if policy.constraint is None:
        return HFSampler(policy.model, policy.tokenizer, allowed_V=policy.allowed_V, rows=rows)
    return ConstrainedSampler(policy.model, policy.tokenizer, policy.constraint, rows=rows)
