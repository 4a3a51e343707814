"""The models that a run folder holds."""

from __future__ import annotations

from pathlib import Path

from rankgrpo.errors import ConfigError


def is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file()


def run_models(folder: Path) -> dict[str, Path]:
    """The models that a run folder holds, in the order they were made. Raises ConfigError when there is none."""
    stages = {"before": folder / "init", "sft": folder / "sft" / "final", "rank-grpo": folder / "rl" / "best"}
    found = {stage: path for stage, path in stages.items() if path.is_dir()}
    if not found:
        raise ConfigError(f"{folder}: this run has no model yet; `rankgrpo run --run-dir {folder}` continues it")
    return found
