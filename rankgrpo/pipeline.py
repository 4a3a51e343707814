"""The whole program: demonstrations -> model -> warm start -> Rank-GRPO -> evaluation -> report, in one run folder.

Every stage writes its result under its final name only when it is complete, and is skipped when that is there, so the
same command continues a run from wherever it stopped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from rankgrpo.checkpoint import write_atomic
from rankgrpo.config import Config, ConfigError, changed_keys, load_config, to_toml, with_steps
from rankgrpo.data import Dataset, Sample, load_dataset, read_samples, write_samples
from rankgrpo.distill.augment import short_demonstrations
from rankgrpo.distill.teacher import EaseTeacher, make_demonstrations, popularity_lists
from rankgrpo.distributed import Parallel, start_parallel, wait_for_all
from rankgrpo.evaluate import Evaluation, read_evaluation, score_completions, score_items, summarise, write_evaluation
from rankgrpo.model import make_init
from rankgrpo.policy import open_policy
from rankgrpo.recommend import recommend
from rankgrpo.report import build_report
from rankgrpo.sft import train_sft
from rankgrpo.tables import format_table
from rankgrpo.tiny import TinyConfig
from rankgrpo.train import train
from rankgrpo.validate import recommend_lists

Until = Literal["sft", "rl", "report"]
BASELINES = ("popularity", "ease")
DEFAULT_RUN = "runs/tiny-demo"


def run_pipeline(config: Config, run_dir: Path, *, until: Until = "report", rl_start: str | None = None) -> None:
    """Run or continue the pipeline in `run_dir`, up to the stage `until`.

    Raises ConfigError when `run_dir` was started with another configuration.
    """
    parallel = start_parallel()
    dataset = load_config_dataset(config)
    config = with_steps(config, len(dataset.train))
    if parallel.is_main:
        open_run(config, run_dir)
    wait_for_all(parallel)
    say(parallel, f"run folder {run_dir}")
    if dataset.problems:
        say(
            parallel,
            f"{len(dataset.problems)} problems in the data; `rankgrpo data check {config.data.path}` lists them",
        )

    if rl_start is None:
        demonstrations = teach(config, dataset, run_dir, parallel)
        say(parallel, f"model {config.model.name}")
        init = make_start(config, dataset, demonstrations, run_dir, parallel)
        rl_start = str(train_sft(config, dataset, demonstrations, init, run_dir / "sft", parallel))
    if until == "sft":
        return
    train(config, dataset, rl_start, run_dir / "rl", parallel)
    if until == "rl" or not parallel.is_main:
        return
    evaluate_run(config, dataset, run_dir, rl_start, parallel)
    print(results_table(run_dir, config.eval.split))
    print(f"\nreport: {build_report(run_dir)}")


def say(parallel: Parallel, text: str) -> None:
    if parallel.is_main:
        print(f"> {text}", flush=True)


def load_config_dataset(config: Config) -> Dataset:
    return load_dataset(config.data.path, num_train=config.data.num_train or None)


def open_run(config: Config, run_dir: Path) -> None:
    """Write config.toml and meta.json, or check that the run there was started with this configuration."""
    saved = run_dir / "config.toml"
    if saved.exists():
        changed = changed_keys(load_config(saved), config)
        if changed:
            raise ConfigError(
                f"{saved}: this run was started with another configuration ({'; '.join(changed)}). Repeat the command "
                f"with the saved values to continue it, or name a new run folder"
            )
    write_atomic(saved, to_toml(config))
    if not (run_dir / "meta.json").exists():
        write_atomic(run_dir / "meta.json", json.dumps(describe_machine(), indent=2))


def describe_machine() -> dict:
    """Versions, commit, command and machine, for the record."""
    packages = ("rankgrpo", "torch", "transformers", "tokenizers", "numpy")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": " ".join(["rankgrpo", *sys.argv[1:]]),
        "commit": source_commit(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in packages},
        "machine": ", ".join(gpus) if gpus else f"{platform.machine()}, {os.cpu_count()} CPUs",
    }


def source_commit() -> str | None:
    """Commit of the source tree; None without git or outside a repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def installed_version(package: str) -> str | None:
    """None when the package is imported from a source tree that was never installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def teach(config: Config, dataset: Dataset, run_dir: Path, parallel: Parallel) -> dict[str, list[Sample]]:
    """The teacher's lists for the training and validation conversations, from disk when they are there."""
    paths = {split: run_dir / f"demonstrations-{split}.jsonl" for split in ("train", "validation")}
    if parallel.is_main and not all(path.exists() for path in paths.values()):
        say(parallel, "teacher: EASE on the training split")
        teacher = fit_teacher(config, dataset, num_folds=config.teacher.num_folds)
        num_items = config.data.num_ranks
        for split, path in paths.items():
            demonstrations = make_demonstrations(dataset.split(split), teacher, num_items=num_items)
            if split == "train":
                demonstrations += short_demonstrations(
                    dataset.train,
                    teacher,
                    dataset.catalog,
                    num_variants=config.teacher.short_requests,
                    num_items=num_items,
                    seed=config.seed,
                )
            write_samples(path, demonstrations)
    wait_for_all(parallel)
    return {split: read_samples(path)[0] for split, path in paths.items()}


def make_start(
    config: Config, dataset: Dataset, demonstrations: dict[str, list[Sample]], run_dir: Path, parallel: Parallel
) -> str:
    """The model before any training: made here for `tiny`, converted for `smollm2-135m`, else where it is found."""
    size = config.model
    tiny = TinyConfig(size.hidden, size.layers, size.ffn, size.heads, size.kv_heads, size.vocab)
    taught = replace(dataset, train=demonstrations["train"])  # the tokenizer also learns from the lists
    if not parallel.is_main:
        wait_for_all(parallel)
    start = make_init(config.model.name, taught, run_dir / "init", seed=config.seed, tiny=tiny)
    if parallel.is_main:
        wait_for_all(parallel)
    return start


def evaluate_run(config: Config, dataset: Dataset, run_dir: Path, rl_start: str, parallel: Parallel) -> None:
    """Score the run's three models and the two baselines on the evaluation split; finished ones are kept."""
    split = config.eval.split
    samples = first_samples(dataset, split, config.eval.num_samples)
    before = run_dir / "init" if (run_dir / "init").is_dir() else config.model.name
    sources = {"before": before, "sft": rl_start, "rank-grpo": run_dir / "rl" / "best"}
    for name in (*sources, *BASELINES):
        if not evaluation_path(run_dir, split, name).exists():
            evaluation = score_source(str(sources.get(name, name)), samples, config, dataset, parallel)
            write_evaluation(run_dir, evaluation, name=name, split=split)


def score_source(
    source: str, samples: list[Sample], config: Config, dataset: Dataset, parallel: Parallel
) -> Evaluation:
    """Scores of `popularity`, `ease`, or a model folder or hub id on `samples`."""
    num_ranks, year_tolerance = config.data.num_ranks, config.rl.year_tolerance
    if source in BASELINES:
        if source == "popularity":
            lists = popularity_lists(dataset.train, samples, dataset.catalog, num_items=num_ranks)
        else:
            lists = fit_teacher(config, dataset, num_folds=0).rank_all(samples, num_items=num_ranks)
        return score_items(samples, lists, dataset.catalog, num_ranks=num_ranks, year_tolerance=year_tolerance)
    policy = open_policy(source, config.model, parallel.device, trainable=False)
    texts = recommend_lists(policy, samples, config, title=f"evaluate {source}")
    return score_completions(samples, texts, dataset.catalog, num_ranks=num_ranks, year_tolerance=year_tolerance)


def evaluate_models(models: list[str], config: Config, *, split: str, num_samples: int, out: Path | None) -> str:
    """Table of any models and baselines on one split; a run folder stands for its three models."""
    parallel = start_parallel()
    dataset = load_config_dataset(config)
    samples = first_samples(dataset, split, num_samples)
    summaries = []
    for name, source in name_sources(models).items():
        evaluation = score_source(source, samples, config, dataset, parallel)
        summaries.append(summarise(evaluation, name=name, split=split))
        if out is not None:
            write_evaluation(out, evaluation, name=re.sub(r"[^\w.@+-]", "-", name), split=split)
    return format_table(summaries)


def name_sources(models: list[str]) -> dict[str, str]:
    """Name shown -> what to load, in order. Raises ConfigError for a run folder without a trained model."""
    sources = {}
    for model in models:
        folder = Path(model)
        if model in BASELINES or not is_run(folder):
            sources[model] = model
            continue
        stages = {"before": folder / "init", "sft": folder / "sft" / "final", "rank-grpo": folder / "rl" / "best"}
        found = {f"{folder.name}/{stage}": str(path) for stage, path in stages.items() if path.is_dir()}
        if not found:
            raise ConfigError(f"{folder}: this run has no model yet; `rankgrpo run --run {folder}` continues it")
        sources |= found
    return sources


def is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file()


def recommend_from(model: str, data: str | None, conversation: str | None, batch: Path | None) -> None:
    """Recommend with a run's best model, or with any model; the catalog is the run's unless `data` names another."""
    folder = Path(model)
    config = load_config(folder / "config.toml") if is_run(folder) else Config()
    if is_run(folder):
        trained = [path for path in (folder / "rl" / "best", folder / "sft" / "final") if path.is_dir()]
        if not trained:
            raise ConfigError(
                f"{folder}: this run has no trained model yet; `rankgrpo run --run {folder}` continues it"
            )
        model = str(trained[0])
    elif model == DEFAULT_RUN and not folder.exists():
        raise ConfigError(
            f"{model}: no such run; `make train` (or `rankgrpo run`) makes it, or name a model with --model"
        )
    if data is not None:
        config = replace(config, data=replace(config.data, path=data))
    policy = open_policy(model, config.model, start_parallel().device, trainable=False)
    recommend(policy, load_config_dataset(config).catalog, config, conversation=conversation, batch=batch)


def first_samples(dataset: Dataset, split: str, num_samples: int) -> list[Sample]:
    samples = dataset.split(split)
    return samples[:num_samples] if num_samples else samples


def evaluation_path(run_dir: Path, split: str, name: str) -> Path:
    return run_dir / "eval" / split / f"{name}.json"


def results_table(run_dir: Path, split: str) -> str:
    names = ("before", "sft", "rank-grpo", *BASELINES)
    return format_table([read_evaluation(evaluation_path(run_dir, split, name)) for name in names])
