"""The section `track` of a configuration."""

from __future__ import annotations

from typing import Literal

from rankgrpo.files.sections import section


@section
class TrackConfig:
    """An experiment tracker beside metrics.jsonl. A run may go on under other values."""

    kind: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    """What `--track` sets: Weights & Biases, trackio, or TensorBoard files in RUN/tensorboard."""
    project: str = "rankgrpo"
    offline: bool = False
    """wandb: write into RUN/wandb and send nothing (`wandb sync` does). The others write to this machine anyway."""
