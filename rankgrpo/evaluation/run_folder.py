"""The models that a run folder holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rankgrpo.errors import ConfigError


def is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file()


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """What run folders are called: their last part, and of the path before it as much as tells them apart.

    Example: distinct_names([Path("a/1/run"), Path("a/2/run"), Path("b/own")]) is ["1/run", "2/run", "own"]
    """
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]  # links keep the name that they were given
    names = []
    for parts in paths:
        length = 1
        while any(other != parts and other[-length:] == parts[-length:] for other in paths):
            length += 1
        names.append("/".join(parts[-length:]))
    return names


def run_models(folder: Path) -> dict[str, Path]:
    """The models that a run folder holds, in the order they were made. Raises ConfigError when there is none."""
    stages = {"before": folder / "init", "sft": folder / "sft" / "final", "rank-grpo": folder / "rl" / "best"}
    found = {stage: path for stage, path in stages.items() if path.is_dir()}
    if not found:
        raise ConfigError(f"{folder}: this run has no model yet; `rankgrpo run --run-dir {folder}` continues it")
    return found
