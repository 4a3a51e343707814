"""Scores of runs, models and baselines side by side, and lists from any of them.

A run folder stands for its three models (before, sft, rank-grpo), each evaluated with the settings it was trained with;
any other model with those that fit it (`rankgrpo.model.fit`).
`popularity` and `ease` are fitted on the training split of the data set that everything is compared on.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rankgrpo.baselines.ease import EaseTeacher
from rankgrpo.baselines.popularity import popularity_counts, popularity_lists
from rankgrpo.config import Config
from rankgrpo.config_file import load_config
from rankgrpo.data.load import load_dataset
from rankgrpo.data.prompt import open_prompt
from rankgrpo.data.samples import SPLITS, Dataset, Sample
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.diversity import Diversity, describe_lists, diversity_path, summarise_lists, write_diversity
from rankgrpo.evaluation.evaluate import (
    Evaluation,
    compare,
    mean_evaluation,
    read_evaluation,
    read_lists,
    score_completions,
    score_items,
    summarise,
    write_evaluation,
)
from rankgrpo.evaluation.lists import sample_lists
from rankgrpo.evaluation.run_folder import distinct_names, is_run, run_models
from rankgrpo.evaluation.tables import format_table
from rankgrpo.evaluation.trec import write_trec
from rankgrpo.files.template import placeholders
from rankgrpo.items.catalog import Catalog
from rankgrpo.model.constraint import hold_to_catalog
from rankgrpo.model.fit import model_settings, run_of
from rankgrpo.model.policy import open_policy
from rankgrpo.model.presets import resolve_model
from rankgrpo.runtime.distributed import Parallel, start_parallel, wait_for_all
from rankgrpo.sampler.choose import ready_sampler
from rankgrpo.sampler.verify import verify_policy

BASELINES = ("popularity", "ease")


@dataclass(frozen=True)
class Source:
    """What is evaluated: a name for the table, a model folder, hub id or baseline, and the settings that go with it."""

    name: str
    location: str
    config: Config


def load_config_dataset(config: Config) -> Dataset:
    """The data set of the settings. Raises DataError, and ConfigError for a prompt that its samples cannot fill."""
    data, prompt = config.data, open_prompt(config.data)
    dataset = load_dataset(data.path, num_train=data.num_train or None, item_format=prompt.item_format, gain=data.gain)
    prompt.check(sample for split in SPLITS for sample in dataset.split(split))
    used = [f"unknown field {name!r} " for name in placeholders(prompt.template)]
    problems = [p for p in dataset.problems if not any(p.text.startswith(words) for words in used)]
    return replace(dataset, problems=problems)


def fit_teacher(config: Config, dataset: Dataset, *, num_folds: int) -> EaseTeacher:
    teacher = config.teacher
    return EaseTeacher.fit(
        dataset.train,
        dataset.catalog,
        l2=teacher.l2,
        popularity_weight=teacher.popularity_weight,
        num_folds=num_folds,
        seed=config.seed,
    )


def score_source(source: Source, samples: list[Sample], dataset: Dataset, parallel: Parallel) -> Evaluation:
    """Scores of a model's lists, or of a baseline's, on `samples`; the processes share a model's work."""
    config = source.config
    num_ranks = config.data.num_ranks
    terms = {"num_ranks": num_ranks, "year_tolerance": config.rl.year_tolerance, "cutoffs": config.eval.ranks}
    if source.location in BASELINES:
        if source.location == "popularity":
            lists = popularity_lists(dataset.train, samples, dataset.catalog, num_items=num_ranks)
        else:
            lists = fit_teacher(config, dataset, num_folds=0).rank_all(samples, num_items=num_ranks)
        return score_items(samples, lists, dataset.catalog, **terms)
    draws, temperature = config.eval.draws, config.eval.temperature
    lists = draw_lists(source, samples, draws, temperature, f"evaluate {source.name}", dataset.catalog, parallel)
    evaluations = []
    for draw in range(draws):
        texts = [of_sample[draw] for of_sample in lists]
        evaluations.append(score_completions(samples, texts, dataset.catalog, **terms))
    return mean_evaluation(evaluations)


def describe_source(
    source: Source, samples: list[Sample], num_lists: int, dataset: Dataset, parallel: Parallel
) -> Diversity:
    """What `num_lists` lists a sample of a model find together (a baseline has one); shared as in `score_source`."""
    config = source.config
    if source.location in BASELINES:
        lists = [[row["completion"]] for row in score_source(source, samples, dataset, parallel).rows]
    else:
        title = f"{num_lists} lists of {source.name}"
        lists = draw_lists(source, samples, num_lists, config.rl.temperature, title, dataset.catalog, parallel)
    return describe_lists(
        samples,
        lists,
        dataset.catalog,
        popularity_counts(dataset.train, dataset.catalog),
        num_ranks=config.data.num_ranks,
        year_tolerance=config.rl.year_tolerance,
    )


def draw_lists(
    source: Source,
    samples: list[Sample],
    num_lists: int,
    temperature: float,
    title: str,
    catalog: Catalog,
    parallel: Parallel,
) -> list[list[str]]:
    """`num_lists` lists a sample of a model, as text; every process decodes its share of the samples and gets all."""
    policy = open_policy(source.location, source.config.model, parallel.device, trainable=False)
    policy = verify_policy(hold_to_catalog(policy, source.config, catalog, shown=True), source.config)
    mine = samples[parallel.dp_rank :: parallel.dp_world]
    with ready_sampler(policy, source.config, parallel) as sampler:
        groups = sample_lists(
            policy, sampler, mine, catalog, source.config, num_lists=num_lists, temperature=temperature, title=title
        )
    parts = parallel.gather([json.dumps(texts) for texts in groups])
    world = parallel.dp_world
    return [json.loads(parts[place % world][place // world]) for place in range(sum(map(len, parts)))]


def evaluate_run(
    config: Config, dataset: Dataset, run_dir: Path, stages: Mapping[str, str], parallel: Parallel
) -> None:
    """Score the run's models (`stages`: name -> location) and the two baselines; what is done is kept.

    A score is the mean of eval.draws lists a conversation; with eval.lists above 1 the union of so many is scored too.
    Every process takes its share of the lists; the main one writes the scores.
    """
    split, locations = config.eval.split, {**stages, **{name: name for name in BASELINES}}
    samples = first_samples(dataset, split, config.eval.num_samples)
    missing = [name for name in locations if not evaluation_path(run_dir, split, name).exists()]
    undescribed = [name for name in locations if not diversity_path(run_dir, split, name).exists()]
    wait_for_all(parallel)  # everybody has looked before anybody writes
    for name in missing:
        if name in BASELINES and not parallel.is_main:
            continue  # one process ranks the catalog alone
        evaluation = score_source(Source(name, locations[name], config), samples, dataset, parallel)
        if parallel.is_main:
            write_evaluation(run_dir, evaluation, name=name, split=split)
    samples = first_samples(dataset, split, config.eval.list_samples)
    for name in undescribed if config.eval.lists > 1 else []:
        if name in BASELINES and not parallel.is_main:
            continue
        source = Source(name, locations[name], config)
        diversity = describe_source(source, samples, config.eval.lists, dataset, parallel)
        if parallel.is_main:
            write_diversity(run_dir, diversity, name=name, split=split)


def results_table(run_dir: Path, split: str, stages: Iterable[str]) -> str:
    """The table at the end of a run, and what RL gained over its start on the same conversations."""
    stages = list(stages)
    table = format_table([read_evaluation(evaluation_path(run_dir, split, name)) for name in (*stages, *BASELINES)])
    if "rank-grpo" not in stages[1:]:
        return table
    before = stages[stages.index("rank-grpo") - 1]
    start, trained = (
        read_lists(evaluation_path(run_dir, split, name).with_suffix(".lists.jsonl")) for name in (before, "rank-grpo")
    )
    gain = compare(start, trained)[f"ndcg@{start.hits.shape[1]}"]
    difference, relative = gain["difference"], gain["relative"]
    share = "" if relative is None else " = {mean:+.1%} [{low:+.1%}, {high:+.1%}]".format(**relative)
    label = {"sft": "SFT", "before": "the untrained model"}[before]
    return (
        f"{table}\n\nRL over {label}, NDCG@{start.hits.shape[1]}: "
        f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]{share}, paired bootstrap"
    )


def evaluate_models(
    models: list[str],
    *,
    data: str | None,
    split: str,
    num_samples: int,
    out: Path | None,
    markdown: bool = False,
    num_lists: int = 1,
    trec: Path | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Table of any models and baselines on one split of `data` (default: the first run's data set, else the demo).

    `overrides` (section.key=value) change the settings of all: a run's own, and the defaults that other models go by.
    With more than one list a sample, the table is of what these lists find together. `trec` is a folder for run and
    qrels files (`evaluation.trec`), and asks for one list a sample, eval.draws = 1. Raises ConfigError and ModelError
    for what cannot be evaluated, before anything is computed.
    """
    sources = list_sources(models, data, overrides)
    if trec is not None and (num_lists > 1 or any(source.config.eval.draws > 1 for source in sources)):
        raise ConfigError("--export trec writes one list a conversation; add --set eval.draws=1 and leave out --lists")
    check_comparable(sources)
    file_names = [""] * len(sources) if out is None and trec is None else _file_names(sources)
    parallel = start_parallel()
    dataset = load_config_dataset(sources[0].config)
    samples = first_samples(dataset, split, num_samples)
    summaries = []
    for source, file_name in zip(sources, file_names, strict=True):
        if num_lists > 1:
            diversity = describe_source(source, samples, num_lists, dataset, parallel)
            summaries.append(summarise_lists(diversity, name=source.name, split=split))
            if out is not None:
                write_diversity(out, diversity, name=file_name, split=split)
        else:
            evaluation = score_source(source, samples, dataset, parallel)
            summaries.append(summarise(evaluation, name=source.name, split=split))
            if out is not None:
                write_evaluation(out, evaluation, name=file_name, split=split)
            if trec is not None:
                write_trec(
                    trec,
                    evaluation,
                    samples,
                    dataset.catalog,
                    name=file_name,
                    num_ranks=source.config.data.num_ranks,
                    year_tolerance=source.config.rl.year_tolerance,
                )
    return format_table(summaries, markdown=markdown)


def check_comparable(sources: Sequence[Source]) -> None:
    """Raise ConfigError where runs disagree on what an item is or what a hit is worth: one table would mix tasks."""
    for section, key, way_out in (
        ("data", "item", "evaluate them apart"),
        ("data", "gain", "give --set data.gain=NAME, which counts for all"),
        ("rl", "year_tolerance", "give --set rl.year_tolerance=YEARS, which counts for all"),
    ):
        first, *others = ((source.name, getattr(getattr(source.config, section), key)) for source in sources)
        for name, value in others:
            if value != first[1]:
                raise ConfigError(
                    f"{section}.{key} is {first[1]!r} of {first[0]} and {value!r} of {name}, which are scored "
                    f"differently; {way_out}"
                )


def list_sources(models: list[str], data: str | None, overrides: Sequence[str] = ()) -> list[Source]:
    """What the names given to `rankgrpo evaluate` stand for, in order, all on one data set."""
    if not models:
        raise ConfigError("nothing to evaluate: name run folders, models, `popularity` or `ease`")
    runs = [Path(model) for model in models if is_run(Path(model))]
    name_of = dict(zip(runs, distinct_names(runs), strict=True))
    runs = runs or [run for model in models if (run := run_of(model)) is not None]  # RUN/sft/final
    common = load_config(runs[0] / "config.toml" if runs else None, overrides, saved=True)
    chosen = replace(common.data, path=data, num_train=0) if data is not None else common.data
    sources = []
    for model in models:
        folder = Path(model)
        if is_run(folder):
            config = load_config(folder / "config.toml", overrides, saved=True)
            config = replace(config, data=replace(config.data, path=chosen.path, num_train=chosen.num_train))
            stages = run_models(folder)
            sources += [Source(f"{name_of[folder]}/{stage}", str(path), config) for stage, path in stages.items()]
        else:
            sources.append(Source(model, model, _settings_of(model, replace(common, data=chosen), overrides)))
    if again := [name for name, count in Counter(source.name for source in sources).items() if count > 1]:
        raise ConfigError(f"two of the models to evaluate are called {again[0]}; name every model once")
    return sources


def _file_names(sources: Sequence[Source]) -> list[str]:
    """What the results of each are called as files. Raises ConfigError where two would be one file."""
    names = [re.sub(r"[^\w.@+-]", "-", source.name).lstrip(".") for source in sources]
    for place, name in enumerate(names):
        if name in names[:place]:
            first = sources[names.index(name)].name
            raise ConfigError(
                f"--out: {first} and {sources[place].name} would both be written as {name}.json; evaluate them in two "
                "commands, with a folder each"
            )
    return names


def _settings_of(model: str, common: Config, overrides: Sequence[str]) -> Config:
    """What a model that is no run folder is scored under: the settings of the run that made it, or those that fit it.

    The task is the same for all: data, prompt, length and format of the lists. Baselines have nothing else.
    """
    if model in BASELINES:
        return common
    resolve_model(model)
    data = common.data
    shared = ("path", "num_train", "num_ranks", "prompt", "item_noun", "item_nouns")
    task = {f"data__{key}": getattr(data, key) for key in shared}
    if (run := run_of(model)) is not None:
        own = load_config(run / "config.toml", list(overrides), saved=True, **task)
    else:
        own, lines = model_settings(model, None, overrides, data__item=data.item, data__gain=data.gain, **task)
        print("".join(f"> {line}\n" for line in lines), end="", flush=True)
    return replace(own, rl=replace(own.rl, year_tolerance=common.rl.year_tolerance))


def first_samples(dataset: Dataset, split: str, num_samples: int) -> list[Sample]:
    """So many samples of a split, all for 0. Raises ValueError for fewer than none."""
    if num_samples < 0:
        raise ValueError(f"num_samples must be at least 0 (all), got {num_samples}")
    samples = dataset.split(split)
    return samples[:num_samples] if num_samples else samples


def evaluation_path(run_dir: Path, split: str, name: str) -> Path:
    return run_dir / "eval" / split / f"{name}.json"
