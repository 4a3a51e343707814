"""How many lists an engine decodes at once."""

from __future__ import annotations

import math

from rankgrpo.config import Config


def step_rows(config: Config, num_processes: int) -> int:
    """Lists of a training step that one engine decodes together."""
    rl = config.rl
    return min(rl.sampler_rows, rl.vllm_tp * math.ceil(rl.prompts_per_step / num_processes) * rl.group_size)


def engine_rows(config: Config, num_processes: int) -> int:
    """Lists that one engine may decode together: a validation may have more of them than a step, one a prompt."""
    return max(step_rows(config, num_processes), min(config.rl.sampler_rows, config.rl.eval_samples))
