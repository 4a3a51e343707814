"""`rankgrpo export`: a folder that transformers and vLLM open as it is: model, model card, catalog and its settings.

It holds the model of a run, README.md (the card), catalog.jsonl, lists.json (how lists are asked for and held to the
catalog; `rankgrpo.sampler.vllm_serve` reads it), config.toml of the run, and request.json, a request for an
OpenAI-compatible server.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from rankgrpo.config import Config
from rankgrpo.config_file import load_config, own_keys
from rankgrpo.data.candidates import check_candidates
from rankgrpo.data.load import load_catalog, needs_candidates
from rankgrpo.data.prompt import TEMPLATE_DATE, open_prompt
from rankgrpo.data.samples import Sample, Turn, read_samples
from rankgrpo.errors import ConfigError, DataError, ModelError
from rankgrpo.evaluation.evaluate import read_evaluation
from rankgrpo.evaluation.tables import format_table
from rankgrpo.files.atomic import atomic_folder
from rankgrpo.files.template import placeholders
from rankgrpo.items.catalog import Catalog
from rankgrpo.items.format import ItemFormat
from rankgrpo.model.constraint import Constraint, forbidden_items, open_constraint
from rankgrpo.model.presets import HUB_ID, load_tokenizer, resolve_model
from rankgrpo.sampler.vllm_serve import SETTINGS_FILE
from rankgrpo.sampler.vllm_trie import request_arguments

Which = Literal["best", "final", "sft"]
FOLDERS: dict[Which, str] = {"best": "rl/best", "final": "rl/final", "sft": "sft/final"}
LICENCES = {
    "smollm2-135m": "apache-2.0",
    "qwen2.5-0.5b": "apache-2.0",
    "llama3.2-1b": "llama3.2",
    "llama3.2-3b": "llama3.2",
}
EXAMPLE = "Something slow and eerie like Stalker (1979)?"
_EXAMPLE = Sample("example", (Turn("user", EXAMPLE),), (), ())
STANDS_FOR = {
    "context": "a line `USER: ...` or `SYSTEM: ...` for every turn",
    "seen": "the titles already mentioned, with commas between",
    "candidates": "a line for every candidate, with its text",
}


def export_run(run_dir: Path, out: Path, *, which: Which = "best") -> Path:
    """Write the model of a run as the folder `out`, whole or not at all; returns it.

    Raises ModelError for a run without that model, ConfigError for an `out` that exists, and DataError or ConfigError
    for a run whose data set cannot be found or has no example that its prompt can be filled with.
    """
    model = run_dir / FOLDERS[which]
    if not (model / "config.json").is_file():
        there = [name for name, folder in FOLDERS.items() if (run_dir / folder / "config.json").is_file()]
        way = f"this run has {', '.join(there)} (--which)" if there else "`rankgrpo run --run-dir` trains one"
        raise ModelError(f"{model}: no model; {way}")
    if out.exists():
        raise ConfigError(f"{out}: it exists; name a new folder, or remove it")
    config = load_config(run_dir / "config.toml", saved=True)
    catalog = load_catalog(config.data.path, ItemFormat(config.data.item))
    example = example_sample(config, catalog)
    settings = served_settings(config, example)
    request = example_request(config, example, str(out), catalog, _constraint(config, catalog, model))
    with atomic_folder(out) as folder:
        for path in sorted(model.iterdir()):
            shutil.copy2(path, folder / path.name)
        shutil.copy2(run_dir / "config.toml", folder / "config.toml")
        catalog.to_jsonl(folder / "catalog.jsonl")
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        (folder / "request.json").write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
        card = model_card(run_dir, config, which, len(catalog), settings["prompt"])
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def example_sample(config: Config, catalog: Catalog) -> Sample:
    """What the example asks: `EXAMPLE`, or the first validation sample where prompts need more than a conversation.

    Raises DataError and ConfigError for a sample that the prompt cannot be filled with, or that no list answers.
    """
    prompt, data = open_prompt(config.data), config.data
    if not prompt.missing_fields(_EXAMPLE) and not needs_candidates(data.path):
        return _EXAMPLE
    path = Path(data.path) / "validation.jsonl"
    samples, _ = read_samples(path, item_format=catalog.item_format)
    if not samples:
        raise DataError(f"{path}: no sample, of which the example of an export is made; write one into it")
    prompt.check(samples[:1])
    held = config.shown_constrain == "catalog"
    check_candidates(samples[:1], catalog, data.num_ranks, config.rl.forbid, held=held)
    return samples[0]


def served_settings(config: Config, example: Sample) -> dict[str, Any]:
    """What a server has to know beside the model: how lists are asked for, written and held."""
    return {
        "num_ranks": config.data.num_ranks,
        "item": config.data.item,
        "constrain": config.shown_constrain,
        "forbid": config.rl.forbid,
        "temperature": config.eval.temperature,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "prompt": open_prompt(config.data).template_of(example).replace("{num_ranks}", str(config.data.num_ranks)),
    }


def example_request(
    config: Config, example: Sample, model: str, catalog: Catalog, constraint: Constraint | None
) -> dict[str, Any]:
    """The body of a chat completion that asks for one list, held to the catalog where the run shows held lists.

    Any held list fits into its max_tokens; free ones have those that the run was trained with.
    """
    prompt = open_prompt(config.data)
    request = {
        "model": model,
        "messages": prompt.messages(example, config.data.num_ranks),
        "temperature": config.eval.temperature,
        "max_tokens": config.rl.max_new_tokens if constraint is None else constraint.max_tokens,
        "chat_template_kwargs": {"date_string": TEMPLATE_DATE, "enable_thinking": False, **prompt.chat_kwargs},
    }
    if constraint is not None:
        (closed,) = forbidden_items(constraint, [example], catalog)
        request["vllm_xargs"] = request_arguments(closed)
    return request


def model_card(run_dir: Path, config: Config, which: Which, num_items: int, prompt: str) -> str:
    """README.md in the form of the hub: data, method, results with intervals, licence, and how to reproduce.

    prompt: that of `served_settings`.
    """
    preset = resolve_model(config.model.name)
    base = preset.location if preset.origin in ("hub", "package") else ""
    licence = LICENCES.get(config.model.name, "other")
    front = ["---", f"license: {licence}", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {base}"] if preset.origin == "hub" else []
    front += ["tags:", "- recommendation", "- rank-grpo", "- reinforcement-learning", "---"]
    meta_path = run_dir / "meta.json"
    meta = json.loads(meta_path.read_text(encoding="utf-8")) if meta_path.is_file() else {}
    summaries = [read_evaluation(path) for path in sorted((run_dir / "eval").glob("*/*.json"))]
    split = config.eval.split if any(one["split"] == config.eval.split for one in summaries) else None
    shown = [one for one in summaries if one["split"] == split]
    stage = "supervised training alone (the warm start)" if which == "sft" else f"reinforcement learning ({which})"
    held = (
        f"Lists are held to these items: see `{SETTINGS_FILE}`."
        if config.shown_constrain == "catalog"
        else "Lists are decoded freely."
    )
    keys = "\n".join(f"- `{key} = {value!r}`" for key, value in own_keys(config).items())
    about_licence = {
        "other": f"That of {base or preset.location or 'the data it was trained on'}; look there before you pass it on."
    }.get(licence, f"That of the base model {base}: {licence}.")
    versions = ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items())
    lines = [
        *front,
        f"# {run_dir.resolve().name}",
        "",
        f"It answers a conversation with a ranked list of {config.data.num_ranks} items, one a line, written as "
        f"`{config.data.item}`. Base: {base or preset.about}. Training ended after {stage}, by "
        "[rankgrpo](https://arxiv.org/abs/2510.20150).",
        "",
        "## Data",
        "",
        f"`{config.data.path}`; the catalog, `catalog.jsonl`, has {num_items} items. {held}",
        "",
        "## Results",
        "",
        format_table(shown, markdown=True) if shown else "This run has not been evaluated.",
        "",
        "## Method",
        "",
        f"Unit `{config.rl.unit}`, returns `{config.rl.returns}`, {config.rl.num_steps} steps of "
        f"{config.rl.prompts_per_step} conversations with {config.rl.group_size} lists each. What differs from the "
        f"defaults:\n\n{keys or '- nothing'}",
        "",
        "## Use",
        "",
        "`request.json` is a request for an OpenAI-compatible server that serves this folder. The prompt, which the "
        f"model was trained under, is `prompt` of `{SETTINGS_FILE}`; {_stands_for(prompt)}.",
        "",
        "## Reproduce",
        "",
        f"    {meta.get('command', 'rankgrpo run --config config.toml')}",
        "",
        f"Commit {meta.get('commit') or 'unknown'}, {meta.get('machine', 'machine unknown')}, seed {config.seed}; "
        f"{versions or 'versions unknown'}. All settings are in `config.toml`.",
        "",
        "## Licence",
        "",
        about_licence,
    ]
    return "\n".join(lines) + "\n"


def _stands_for(prompt: str) -> str:
    """What goes where the prompt has a name between braces, in words."""
    return ", ".join(
        f"`{{{name}}}` is {STANDS_FOR.get(name, 'that field of a sample')}" for name in placeholders(prompt)
    )


def check_name(name: str) -> None:
    """Raise ConfigError for a hub id that is not owner/model."""
    if not HUB_ID.fullmatch(name):
        raise ConfigError(f"--push {name}: expected owner/model")


def upload(folder: Path, name: str) -> str:
    """Upload an exported folder to the Hugging Face hub as `name`, private when new; returns its address.

    Raises ModelError when the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=str(folder))
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"--push {name}: {reason}. The export is in {folder}; `hf auth login` signs in") from error
    return f"https://huggingface.co/{name}"


def _constraint(config: Config, catalog: Catalog, model: Path) -> Constraint | None:
    """What shown lists are held to; None where they are free."""
    if config.shown_constrain == "none":
        return None
    tokenizer = load_tokenizer(str(model))
    return open_constraint(catalog, tokenizer, num_ranks=config.data.num_ranks, forbid=config.rl.forbid)
