"""The command line: `rankgrpo run`, its stages `distill`, `sft` and `train`, and the tools beside them.

Heavy imports wait until a command needs them, so `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from rankgrpo.distill.settings import DistillConfig
from rankgrpo.errors import ConfigError, UserError
from rankgrpo.evaluation.data_cli import Data, data_app
from rankgrpo.files.options import Overrides, check_least
from rankgrpo.report.cli import export, report, show
from rankgrpo.sizing.cli import plan
from rankgrpo.suite.cli import experiments

if TYPE_CHECKING:
    from rankgrpo.config import Config

Model = Annotated[
    str | None,
    arg(help="preset (see `rankgrpo models`), Hugging Face folder, or hub id (default: that of --from-model, or tiny)"),
]
Method = Annotated[str | None, arg(help="what Rank-GRPO is compared with, or a variant of it (see `rankgrpo methods`)")]
FromModel = Annotated[
    str | None, arg(help="SFT model that Rank-GRPO starts from, in place of a warm start of the run's own")
]
Demonstrations = Annotated[
    str | None, arg(help="folder that `rankgrpo distill` wrote: its demonstrations in place of EASE's plain lists")
]
Track = Annotated[
    Literal["none", "wandb", "trackio", "tensorboard"] | None, arg(help="also send metrics, results and pictures there")
]
RunDir = Annotated[Path, arg(help="run folder; the same command continues an unfinished run")]

app = tyro.extras.SubcommandApp()


@app.command
def run(
    *,
    model: Model = None,
    data: Data = "demo",
    method: Method = None,
    run_dir: Annotated[
        Path | None, arg(help="run folder (default: runs/MODEL-DATA[-METHOD]); the same command continues it")
    ] = None,
    config: Annotated[Path | None, arg(help="TOML file (default: the preset's, experiments/MODEL.toml)")] = None,
    demonstrations: Demonstrations = None,
    from_model: FromModel = None,
    track: Track = None,
    until: Annotated[
        Literal["sft", "rl"], arg(help="last stage of training: sft evaluates the warm start and stops there")
    ] = "rl",
    overrides: Overrides = [],  # noqa: B006  (tyro reads the default, nothing writes to it)
    check: Annotated[bool, arg(help="only check settings, data, run folder, and a model that is a folder")] = False,
) -> None:
    """The whole pipeline: demonstrations, warm start, Rank-GRPO, evaluation, report. Finished stages are not repeated.

    Try:
      rankgrpo run
      rankgrpo run --model tiny --data path/to/redial --run-dir runs/redial
      rankgrpo run --model tiny --method grpo
      rankgrpo run --data path/to/redial --demonstrations runs/distill-redial
      rankgrpo run --model smollm2-135m --set rl.num_steps=50 rl.group_size=4
      torchrun --nproc-per-node 2 -m rankgrpo run
    """
    from rankgrpo.pipeline import check_run, run_pipeline

    settings, run_dir = _settings(
        model, data, config, overrides, run_dir, method, demonstrations, from_model=from_model, track=track
    )
    if check:
        check_run(settings, run_dir)
    else:
        run_pipeline(settings, run_dir, until=until, rl_start=from_model)


@app.command
def sft(
    *,
    model: Model = None,
    data: Data = "demo",
    run_dir: Annotated[Path | None, arg(help="run folder (default: runs/MODEL-DATA)")] = None,
    config: Annotated[Path | None, arg(help="TOML file (default: the preset's)")] = None,
    demonstrations: Demonstrations = None,
    track: Track = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """The pipeline up to the supervised warm start; `rankgrpo run` or `rankgrpo train` continues the same run folder.

    Try:
      rankgrpo sft --model tiny --data demo --run-dir runs/mine
    """
    from rankgrpo.pipeline import run_pipeline

    settings, run_dir = _settings(model, data, config, overrides, run_dir, demonstrations=demonstrations, track=track)
    run_pipeline(settings, run_dir, until="sft", evaluate=False)


@app.command
def train(
    *,
    model: Model = None,
    data: Data = "demo",
    method: Method = None,
    run_dir: Annotated[Path | None, arg(help="run folder (default: runs/MODEL-DATA[-METHOD])")] = None,
    config: Annotated[Path | None, arg(help="TOML file (default: the preset's)")] = None,
    from_model: FromModel = None,
    track: Track = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Rank-GRPO alone, from the run's warm start or from --from-model (an SFT model of your own).

    Try:
      rankgrpo train --run-dir runs/mine
      rankgrpo train --from-model path/to/sft-model --data path/to/redial --run-dir runs/from-mine
      rankgrpo train --from-model runs/mine/sft/final --method gspo --run-dir runs/mine-gspo
    """
    from rankgrpo.pipeline import run_pipeline

    settings, run_dir = _settings(model, data, config, overrides, run_dir, method, from_model=from_model, track=track)
    run_pipeline(settings, run_dir, rl_start=from_model, evaluate=False)


@app.command
def evaluate(
    models: Positional[Annotated[list[str], arg(help="run folders, model folders, hub ids, or `popularity`, `ease`")]],
    *,
    data: Annotated[str | None, arg(help="data set (default: the first run's own, or demo)")] = None,
    split: Literal["validation", "test"] = "test",
    num_samples: Annotated[int, arg(help="samples scored, from the beginning of the split; 0 is all")] = 0,
    out: Annotated[
        Path | None, arg(help="also write the results as JSON, every list as JSONL, into this folder")
    ] = None,
    lists: Annotated[
        int, arg(help="lists sampled a conversation; above 1 the table is of their union: Recall, coverage, popularity")
    ] = 1,
    export: Annotated[
        Literal["trec"] | None, arg(help="also write run and qrels files for ranx, ir-measures, pytrec-eval into --out")
    ] = None,
    markdown: Annotated[bool, arg(help="print the table in Markdown")] = False,
    free: Annotated[bool, arg(help="decode freely, also a run that holds its lists to the catalog")] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Compare any number of models, the popularity list and EASE: Recall and NDCG with 95 % bootstrap intervals.

    Try:
      rankgrpo evaluate runs/tiny-demo popularity ease
      rankgrpo evaluate runs/tiny-demo --lists 16 --num-samples 200
      rankgrpo evaluate runs/tiny-demo --set eval.draws=16
      rankgrpo evaluate runs/tiny-demo --free
      rankgrpo evaluate popularity ease --out results --export trec --set eval.draws=1
      rankgrpo evaluate runs/a/sft/final runs/a/rl/best --data path/to/redial --split validation --out results
    """
    from rankgrpo.evaluation.compare import evaluate_models

    check_least(1, lists=lists)
    check_least(0, num_samples=num_samples)
    if export and out is None:
        raise ConfigError("--export trec writes into the folder of --out; name one")
    table = evaluate_models(
        models,
        data=data,
        split=split,
        num_samples=num_samples,
        out=out,
        markdown=markdown,
        num_lists=lists,
        trec=out if export else None,
        overrides=[*overrides, *(["eval.constrain=none"] if free else [])],
    )
    print(table)


@app.command
def distill(config: OmitArgPrefixes[DistillConfig]) -> None:
    """Stage 1: demonstrations from a teacher's lists, remapped to the catalog, judged, and adjusted to what is right.

    Try:
      rankgrpo distill --data path/to/redial
      rankgrpo distill --data path/to/redial --teacher http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct
      rankgrpo distill --data path/to/redial --teacher https://api.openai.com/v1 --model gpt-4o --num-train 2400 \
        --price-in 2.5 --price-out 10 --estimate
      rankgrpo run --data path/to/redial --demonstrations runs/distill-redial

    A local model is served by `vllm serve Qwen/Qwen2.5-7B-Instruct`. The key of a hosted one is read from
    OPENAI_API_KEY.
    """
    from rankgrpo.distill.stages import distill

    print(distill(config))


@app.command
def recommend(
    conversation: Positional[
        Annotated[str | None, arg(help="what the user said; standard input when left out")]
    ] = None,
    *,
    model: Annotated[str, arg(help="run folder, model folder or hub id")] = "runs/tiny-demo",
    data: Annotated[
        str | None, arg(help="data set whose catalog marks the items (default: the run's own, or demo)")
    ] = None,
    batch: Annotated[Path | None, arg(help="JSONL file of samples; prints one JSON line each")] = None,
    free: Annotated[bool, arg(help="decode freely, also a run that holds its lists to the catalog")] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Print a ranked list: `+` in the catalog, `?` not in the catalog, `!` not an item.

    A list that is held to the catalog is the greedy one; --set eval.temperature=1 draws one.

    Try:
      rankgrpo recommend "Something slow and eerie like Stalker (1979)?"
      printf 'User: I loved Alien (1979)\\nAssistant: More space?\\nUser: Yes, and scary' | rankgrpo recommend
      rankgrpo recommend --model runs/tiny-demo --batch requests.jsonl
    """
    from rankgrpo.evaluation.recommend import recommend_from

    overrides = [*overrides, *(["eval.constrain=none"] if free else [])]
    recommend_from(model, data, conversation, batch, overrides)


@app.command
def models() -> None:
    """List the model presets, where each comes from, and how to use a model of your own."""
    from rankgrpo.model.presets import PRESETS

    for preset in PRESETS.values():
        print(f"{preset.name:14} {preset.location or '-':34} {preset.about}")
    print("\nAny other model: a folder in Hugging Face format (MODEL=/path/to/folder) or a hub id (MODEL=owner/model).")


@app.command
def methods() -> None:
    """List the methods of --method: Rank-GRPO, its variants and what it is compared with, with the keys each sets."""
    from rankgrpo.config_file import method_files

    for name, path in method_files().items():
        print(f"{name}\n{textwrap.indent(path.read_text(encoding='utf-8'), '    ')}")


app.command(report)
app.command(show)
app.command(export)
app.command(experiments)
app.command(plan)
app.command(data_app, name="data")


def default_run_dir(model: str, data: str, method: str | None = None) -> Path:
    """runs/MODEL-DATA, from the last part of each name, and -METHOD when one is given."""
    parts = [Path(model).name, Path(data).resolve().name, *([method] if method else [])]
    return Path("runs") / "-".join(parts)


def _settings(
    model: str | None,
    data: str,
    config: Path | None,
    overrides: list[str],
    run_dir: Path | None,
    method: str | None = None,
    demonstrations: str | None = None,
    from_model: str | None = None,
    track: str | None = None,
) -> tuple[Config, Path]:
    """The settings of a command and its run folder; says which settings were chosen to fit the model, and why."""
    from rankgrpo.model.fit import model_name, model_settings

    run_dir = run_dir or default_run_dir(model_name(model, from_model), data, method)
    direct = {"data__path": data}
    if demonstrations is not None:
        direct["teacher__demonstrations"] = demonstrations
    if track is not None:
        direct["track__kind"] = track
    settings, lines = model_settings(
        model, config, overrides, from_model=from_model, run_dir=run_dir, method=method, **direct
    )
    for line in lines if os.environ.get("RANK", "0") == "0" else []:
        print(f"> {line}", flush=True)
    return settings, run_dir


def message_of(error: Exception) -> str | None:
    """What to tell the user of an error that a run can meet; None for one that is a defect of the program."""
    if isinstance(error, UserError | ValueError):
        return str(error)
    from rankgrpo.runtime.distributed import lost_contact

    if lost_contact(error):
        return (
            f"another process of this run has died, so this one stops; look for its message, or in dmesg for memory "
            f"that ran out. The same command continues from the last checkpoint, and torchrun does so by itself with "
            f"--max-restarts ({str(error).splitlines()[0]})"
        )
    return None


def main() -> None:
    """Run the command line; a mistake in what the user gave is one message, not a traceback."""
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # one process shows progress; read when tqdm is imported
    # OpenMP's threads spin while they wait for each other, and once anything else runs they wait for one that has no
    # core: steps took up to 18 times as long (experiments/bench/threads.py). Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app.cli(prog="rankgrpo", description=__doc__)
        _leave_together()
    except (ValueError, RuntimeError) as error:
        message = None if os.environ.get("RANKGRPO_TRACEBACK") else message_of(error)
        if message is None:
            raise
        if getattr(error, "everywhere", False):
            _leave_together()
            if os.environ.get("RANK", "0") != "0":
                sys.exit(1)  # the first process says it
        sys.exit(f"rankgrpo: {message}")
    except KeyboardInterrupt:
        sys.exit("rankgrpo: stopped; the same command continues from the last checkpoint")


def _leave_together() -> None:
    if "WORLD_SIZE" in os.environ:
        from rankgrpo.runtime.distributed import leave_parallel

        leave_parallel()


if __name__ == "__main__":
    main()
