"""What a run leaves on disk: checkpoints and exported models, counted before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from rankgrpo.config import Config
from rankgrpo.errors import SaveError
from rankgrpo.sizing.architecture import PRESETS, Architecture, find_architecture

GB = 1e9
MADE = ("tiny", "smollm2-135m")
"""Presets of which a run writes its first model itself."""
PARAMETER, MOMENTS = 4, 8
"""Bytes of a float32 parameter, and of its two moments in Adam."""


def disk_bytes(
    num_parameters: int, num_adapters: int, config: Config, *, made: bool = True, warm_start: bool = True
) -> dict[str, int]:
    """Bytes by part at the moment when a run's folder holds the most, its model of `num_parameters` weights.

    A checkpoint has the trained weights (the adapters alone, where there are any) and their moments; the one being
    written is there beside rl.keep_last older ones, as is a better model beside the best so far. Metrics, lists and
    reports are not counted: they are small.

    made: the run makes its first model itself, in RUN/init. warm_start: the run has SFT of its own.
    """
    export, checkpoint = PARAMETER * num_parameters, (PARAMETER + MOMENTS) * (num_adapters or num_parameters)
    sft = warm_start and config.sft.enabled
    return {
        "first model": export * made,
        "SFT checkpoints": (config.sft.keep_last + 1) * checkpoint * sft,
        "SFT model": export * sft,
        "RL checkpoints": (config.rl.keep_last + 1) * checkpoint,
        "RL models": 3 * export,
    }


def disk_line(arch: Architecture, config: Config) -> str:
    """One line: GB on disk, in all and by part."""
    made = config.model.name in MADE
    parts = disk_bytes(arch.num_parameters, arch.adapter_parameters(config.adapter), config, made=made)
    return f"GB on disk {sum(parts.values()) / GB:.1f}: {_told(parts)}"


def _told(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value / GB:.2f}" for name, value in parts.items() if value)


def check_disk(parts: Mapping[str, int], run_dir: Path) -> None:
    """Raise SaveError when the disk of `run_dir` cannot take what is not there yet of `parts`."""
    there = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file() and not file.is_symlink())
    existing = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    free, needed = shutil.disk_usage(existing).free, sum(parts.values()) - there
    if needed > free:
        raise SaveError(
            f"{run_dir}: this run needs {needed / GB:.2f} GB more on disk ({_told(parts)}) and {free / GB:.2f} GB are "
            f"free; free some space, set rl.keep_last=1 sft.keep_last=1, or name a run folder on another disk"
        )


def check_run_disk(config: Config, run_dir: Path, rl_start: str | None) -> None:
    """Raise SaveError when checkpoints and exports do not fit on the disk."""
    from rankgrpo.model.fit import count_model  # `rankgrpo plan` counts without transformers

    name = config.model.name
    if name == "tiny" or name in PRESETS:
        arch = find_architecture(name, config.model)
        size, adapters = arch.num_parameters, arch.adapter_parameters(config.adapter)
    else:
        size, adapters = count_model(name), 0  # an upper bound where adapters are trained
    made = rl_start is None and name in MADE
    check_disk(disk_bytes(size, adapters, config, made=made, warm_start=rl_start is None), run_dir)
