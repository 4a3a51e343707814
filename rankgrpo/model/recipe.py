"""What a model that `make_init` writes was made from: a folder is taken again only for the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankgrpo.data.prompt import PromptFormat
from rankgrpo.data.samples import Dataset
from rankgrpo.errors import ModelError
from rankgrpo.items.format import title_line
from rankgrpo.model.tiny import TinyConfig, corpus_lines

RECIPE_FILE = "rankgrpo_init.json"


def make_recipe(
    preset: str,
    package: str,
    dataset: Dataset,
    seed: int,
    tiny: TinyConfig,
    num_ranks: int,
    prompt: PromptFormat | None,
) -> dict[str, Any]:
    """All that decides what `make_init` writes, as JSON."""
    if package:
        return {"preset": preset, "package": package}
    digest = hashlib.sha256()
    titles = dataset.catalog.lines
    targets = (title_line(title, year) for sample in dataset.train for title, year in sample.groundtruth)
    completions = (sample.completion or "" for sample in dataset.train)
    for texts in (corpus_lines(dataset), titles, targets, completions):
        digest.update("\n".join(texts).encode() + b"\0")
    size = asdict(tiny) | {"architecture": "llama"}
    recipe = {"preset": preset, "seed": seed, "size": size, "data_sha256": digest.hexdigest()}
    # Folders made for 20 ranks and the paper's prompt name neither.
    recipe |= {} if num_ranks == 20 else {"num_ranks": num_ranks}
    default = PromptFormat(dataset.catalog.item_format)
    lines, by_default = (p.fixed_lines(num_ranks, dataset.train) for p in (prompt or default, default))
    return recipe if lines == by_default else recipe | {"prompt": lines}


def check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Raise ModelError for a folder that was made of something else."""
    file = folder / RECIPE_FILE
    if not file.is_file():
        raise ModelError(
            f"{folder} is not empty and was not made by make_init (it has no {RECIPE_FILE}); choose another"
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    if differing := sorted(key for key in found.keys() | recipe.keys() if found.get(key) != recipe.get(key)):
        raise ModelError(
            f"{folder} holds a model made from something else (not the same: {', '.join(differing)}); delete it or "
            "choose another"
        )
